"""What a lease asks of its study is counted, not looked up: one call of a function, whatever the study's size.

Counters are changed by whoever begins or ends an attempt, under the study's lock, so they are exact. `request` is what
an ask can be repeated by, `memory_bytes` the device that a trial ran on. `format` is that of a study's history, `fixed`
the parameters fixed for its rest, `picked` what the sampler "auto" stands for. Two indexes on an Optuna table count
the infeasible and the cancelled trials of a study without reading the others' marks.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

UPGRADE = [
    """
    ALTER TABLE whetstone.studies
        ADD COLUMN format INTEGER DEFAULT 1 NOT NULL,
        ADD COLUMN trials_used BIGINT DEFAULT 0 NOT NULL,
        ADD COLUMN seconds_used DOUBLE PRECISION DEFAULT 0 NOT NULL,
        ADD COLUMN fixed JSONB DEFAULT '{}' NOT NULL,
        ADD COLUMN picked JSONB
    """,
    """
    ALTER TABLE whetstone.attempts
        ADD COLUMN request TEXT UNIQUE,
        ADD COLUMN memory_bytes BIGINT
    """,
    """
    UPDATE whetstone.studies s SET
        trials_used = (
            SELECT count(*) FROM whetstone.attempts a JOIN public.trials t USING (trial_id)
            WHERE a.study_id = s.study_id AND a.attempt = 1 AND NOT (t.state = 'FAIL' AND EXISTS (
                SELECT 1 FROM public.trial_system_attributes m
                WHERE m.trial_id = t.trial_id AND m.key = 'whetstone:cancelled'))),
        seconds_used = (
            SELECT coalesce(sum(extract(epoch FROM a.ended_at - a.leased_at)), 0)
            FROM whetstone.attempts a WHERE a.study_id = s.study_id AND a.ended_at IS NOT NULL)
    """,
    """
    CREATE INDEX IF NOT EXISTS whetstone_infeasible ON public.trial_system_attributes (trial_id)
    WHERE key = 'constraints:infeasible' AND value_json NOT IN ('0', '0.0')
    """,
    """
    CREATE INDEX IF NOT EXISTS whetstone_cancelled ON public.trial_system_attributes (trial_id)
    WHERE key = 'whetstone:cancelled'
    """,
]


def upgrade() -> None:
    for statement in UPGRADE:
        op.execute(statement)
