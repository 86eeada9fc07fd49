"""A worker that ended in good order says so: it is not silent, and its device is free at once."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Of workers that have ended already nobody knows how."""
    op.execute("ALTER TABLE whetstone.workers ADD COLUMN stopped BOOLEAN DEFAULT false NOT NULL")
