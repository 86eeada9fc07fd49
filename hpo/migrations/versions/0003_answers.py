"""Which of the study's frozen tasks a trial answered rightly, one bit a task, so that two trials can be compared."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ANSWERS = """
CREATE TABLE whetstone.answers (
    trial_id INTEGER NOT NULL,
    tasks INTEGER NOT NULL,
    bits BYTEA NOT NULL,
    PRIMARY KEY (trial_id),
    CONSTRAINT answers_length CHECK (octet_length(bits) = (tasks + 7) / 8),
    FOREIGN KEY(trial_id) REFERENCES public.trials (trial_id) ON DELETE CASCADE
);
"""


def upgrade() -> None:
    """Trials that are told already have none."""
    op.execute(ANSWERS)
