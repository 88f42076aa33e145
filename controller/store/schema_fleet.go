package store

// The parts of the fourth migration.
const (
	rolloutSchema = `
-- What a rollout is besides its columns: strategy, wave and gates, as JSON.
-- Older rows had one wave and no gate.
ALTER TABLE rollouts ADD COLUMN detail TEXT NOT NULL DEFAULT '{}';
DROP INDEX rollouts_running;
-- At most one of a deployment has not ended.
CREATE UNIQUE INDEX rollouts_open ON rollouts (deployment) WHERE state IN (1, 5, 6, 7);

-- Class, wave and times of a device's part, as JSON.
ALTER TABLE rollout_devices ADD COLUMN detail TEXT NOT NULL DEFAULT '{}';
-- What was counted of both versions on the device, as JSON; '': nothing.
ALTER TABLE rollout_devices ADD COLUMN figures TEXT NOT NULL DEFAULT '';

CREATE TABLE decisions (
	rollout  INTEGER NOT NULL REFERENCES rollouts (number) ON DELETE CASCADE,
	number   INTEGER NOT NULL, -- from 1
	at       INTEGER NOT NULL,
	decision TEXT NOT NULL,    -- fleet.Decision as JSON
	PRIMARY KEY (rollout, number)
) STRICT, WITHOUT ROWID;
`
	historySchema = `
-- Samples of devices' figures, thinned out as they get older: each stands for
-- the span seconds from slot * span on. New ones come at the end, old ones go
-- at the beginning. A device's go by age alone.
CREATE TABLE telemetry (
	span   INTEGER NOT NULL,
	slot   INTEGER NOT NULL,
	device TEXT NOT NULL,
	sample BLOB NOT NULL, -- an encoded Telemetry
	PRIMARY KEY (span, slot, device)
) STRICT, WITHOUT ROWID;

-- Numbers of versions that were deleted: they are never given again.
CREATE TABLE deleted_versions (
	model   TEXT NOT NULL,
	version INTEGER NOT NULL,
	digest  TEXT NOT NULL,
	PRIMARY KEY (model, version)
) STRICT, WITHOUT ROWID;

-- 1: the store was restored from a copy, and the outbox may go on beyond what
-- the copy has of it.
ALTER TABLE outboxes ADD COLUMN restored INTEGER NOT NULL DEFAULT 0;
CREATE INDEX events_by_age ON events (received_at);
`
)
