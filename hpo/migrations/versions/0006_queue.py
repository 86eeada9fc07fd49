"""The first point of a long queue is found by an index, not by sorting the queue at every ask."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        "CREATE INDEX IF NOT EXISTS whetstone_trials_queue ON public.trials (study_id, number) WHERE state = 'WAITING'"
    )
