"""Our tables, in the schema `whetstone`, beside Optuna's stock ones in `public`.

They hold what Optuna has no place for: specs, attempts with their leases, metrics, answers, corrections, workers,
tokens, sessions and idempotency keys. Alembic (hpo/migrations) makes them; these definitions are what queries are
written against, and a test holds the two together. A trial's state, value and parameters stand in Optuna's tables only:
nothing is stored twice, so nothing has to be reconciled.
"""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BYTEA, JSONB

SCHEMA = "whetstone"
metadata = sa.MetaData(schema=SCHEMA)
_now = sa.text("clock_timestamp()")

# Optuna's tables, as far as ours refer to them: Optuna makes and migrates them.
_optuna_studies = sa.Table("studies", metadata, sa.Column("study_id", sa.Integer, primary_key=True), schema="public")
_optuna_trials = sa.Table("trials", metadata, sa.Column("trial_id", sa.Integer, primary_key=True), schema="public")


def _moment(name: str, *, nullable: bool = False, default: bool = False) -> sa.Column[datetime]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable, server_default=_now if default else None)


studies = sa.Table(
    "studies",
    metadata,
    sa.Column("study_id", sa.ForeignKey("public.studies.study_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("spec", JSONB, nullable=False),
    sa.Column("workload", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, server_default="running"),
    sa.Column("reason", sa.Text, nullable=False, server_default=""),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("budget_trials", sa.BigInteger),
    sa.Column("budget_hours", sa.Double),
    sa.Column("budget_target", sa.Double),
    sa.Column("concurrency", sa.Integer),
    sa.Column("max_attempts", sa.Integer, nullable=False, server_default=sa.text("3")),
    sa.Column("notes", sa.Text, nullable=False, server_default=""),
    _moment("created_at", default=True),
    _moment("finished_at", nullable=True),
    sa.Column("format", sa.Integer, nullable=False, server_default=sa.text("1")),  # of its history
    sa.Column("trials_used", sa.BigInteger, nullable=False, server_default=sa.text("0")),  # begun and not cancelled
    sa.Column("seconds_used", sa.Double, nullable=False, server_default=sa.text("0")),  # by attempts that have ended
    sa.Column("fixed", JSONB, nullable=False, server_default=sa.text("'{}'")),  # flat values for the study's rest
    sa.Column("picked", JSONB),  # what the sampler "auto" stands for, and why
    sa.CheckConstraint("state IN ('running', 'paused', 'stopped', 'finished')", name="studies_state"),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("worker_id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("host", sa.Text, nullable=False, server_default=""),
    sa.Column("device", sa.Text, nullable=False, server_default=""),
    sa.Column("memory_bytes", sa.BigInteger),
    sa.Column("version", sa.Text, nullable=False, server_default=""),
    sa.Column("bearer", sa.Text, nullable=False),
    sa.Column("draining", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("stopped", sa.Boolean, nullable=False, server_default=sa.false()),  # it has taken its leave
    _moment("first_seen", default=True),
    _moment("last_seen", default=True),
)

fencing = sa.Sequence("fencing", schema=SCHEMA, metadata=metadata)
"""Every lease takes the next number as its token, so a later lease always has a larger one."""

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("attempt_id", sa.BigInteger, sa.Identity(), primary_key=True),  # the lease id
    sa.Column("study_id", sa.ForeignKey("public.studies.study_id", ondelete="CASCADE"), nullable=False),
    sa.Column("trial_id", sa.ForeignKey("public.trials.trial_id", ondelete="CASCADE"), nullable=False),
    sa.Column("trial_number", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),  # counts from 1
    sa.Column("token", sa.BigInteger, nullable=False, unique=True),
    sa.Column("worker_id", sa.ForeignKey("whetstone.workers.worker_id", ondelete="SET NULL")),
    sa.Column("bearer", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, server_default="leased"),
    sa.Column("stop_requested", sa.Text, nullable=False, server_default=""),  # why a running trial is to stop
    sa.Column("device", sa.Text, nullable=False, server_default=""),
    sa.Column("resumed_from", sa.Integer),
    sa.Column("checkpoint_epoch", sa.BigInteger),
    sa.Column("last_epoch", sa.BigInteger),
    sa.Column("reason", sa.Text, nullable=False, server_default=""),
    sa.Column("traceback", sa.Text, nullable=False, server_default=""),
    sa.Column("told", JSONB),  # the tell or release that ended it: the same again gets the same answer
    _moment("leased_at", default=True),
    _moment("renewed_at", default=True),
    _moment("expires_at"),
    _moment("ended_at", nullable=True),
    sa.Column("request", sa.Text, unique=True),  # what asked for it: the same again gets the same lease
    sa.Column("memory_bytes", sa.BigInteger),  # of the device that it went to
    sa.UniqueConstraint("trial_id", "attempt"),
    sa.CheckConstraint(
        "state IN ('leased', 'complete', 'infeasible', 'pruned', 'failed', 'released', 'stalled', 'lost', 'cancelled')",
        name="attempts_state",
    ),
    sa.Index("attempts_study", "study_id", "state"),
    sa.Index("attempts_one_live", "trial_id", unique=True, postgresql_where=sa.text("state = 'leased'")),
    sa.Index("attempts_expiry", "expires_at", postgresql_where=sa.text("state = 'leased'")),
)

metrics = sa.Table(
    "metrics",
    metadata,
    sa.Column("attempt_id", sa.ForeignKey("whetstone.attempts.attempt_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("epoch", sa.BigInteger, primary_key=True),
    sa.Column("value", sa.Double),
    sa.Column("metrics", JSONB, nullable=False),
    _moment("at", default=True),
)

answers = sa.Table(
    "answers",
    metadata,
    # A trial is told once and never opened again, so it has at most one row; a requeued point is another trial.
    sa.Column("trial_id", sa.ForeignKey("public.trials.trial_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("tasks", sa.Integer, nullable=False),
    sa.Column("bits", BYTEA, nullable=False),  # `hpo.protocol.TaskAnswers` says in which order
    sa.CheckConstraint("octet_length(bits) = (tasks + 7) / 8", name="answers_length"),
)

revisions = sa.Table(
    "revisions",
    metadata,
    sa.Column("revision_id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("study_id", sa.ForeignKey("public.studies.study_id", ondelete="CASCADE"), nullable=False),
    sa.Column("trial_id", sa.ForeignKey("public.trials.trial_id", ondelete="CASCADE"), nullable=False),
    sa.Column("what", sa.Text, nullable=False),
    _moment("at", default=True),
    sa.Index("revisions_study", "study_id", "revision_id"),
    sa.Index("revisions_trial", "trial_id"),  # deleting a study deletes its trials, each looking here
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("token_id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("sha256", BYTEA, nullable=False, unique=True),
    _moment("created_at", default=True),
    _moment("expires_at", nullable=True),
    _moment("last_used_at", nullable=True),
    _moment("revoked_at", nullable=True),
    sa.CheckConstraint("role IN ('admin', 'worker', 'viewer')", name="tokens_role"),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("sha256", BYTEA, primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("token_id", sa.ForeignKey("whetstone.tokens.token_id", ondelete="CASCADE")),
    _moment("created_at", default=True),
    _moment("expires_at"),
    sa.Column("process_token", BYTEA),  # SHA-256 of the server's own token that opened it: it ends with that token
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("route", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("digest", BYTEA, nullable=False),
    sa.Column("answer", JSONB),
    _moment("created_at", default=True),
    sa.Index("idempotency_age", "created_at"),
)
