"""A session opened by a token that only a running server knows ends when no server accepts that token any more."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Sessions that are open already stay as they were."""
    op.execute("ALTER TABLE whetstone.sessions ADD COLUMN process_token BYTEA")
