package store

import (
	"context"
	"database/sql"
)

// migrations[n] brings a store of version n to n+1. They are never changed
// once released, only added to.
var migrations = []string{`
CREATE TABLE meta (
	key   TEXT PRIMARY KEY,
	value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE audit (
	id     INTEGER PRIMARY KEY,
	at     INTEGER NOT NULL,
	who    TEXT NOT NULL,
	action TEXT NOT NULL,
	object TEXT NOT NULL,
	detail TEXT NOT NULL
) STRICT;

CREATE TABLE users (
	name       TEXT PRIMARY KEY,
	role       TEXT NOT NULL,
	created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE tokens (
	hash       BLOB PRIMARY KEY CHECK (length(hash) = 32),
	user       TEXT NOT NULL REFERENCES users (name) ON DELETE CASCADE,
	created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE join_tokens (
	hash       BLOB PRIMARY KEY CHECK (length(hash) = 32),
	id         TEXT NOT NULL UNIQUE,
	uses_left  INTEGER NOT NULL CHECK (uses_left >= 0),
	expires_at INTEGER NOT NULL,
	labels     TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE devices (
	name          TEXT PRIMARY KEY,
	secret_hash   BLOB NOT NULL CHECK (length(secret_hash) = 32),
	broker_hash   TEXT NOT NULL,
	own_labels    TEXT NOT NULL,
	token_labels  TEXT NOT NULL,
	info          BLOB NOT NULL,
	joined_at     INTEGER NOT NULL,
	last_heard_at INTEGER NOT NULL DEFAULT 0,
	connected     INTEGER NOT NULL DEFAULT 0,
	session       TEXT NOT NULL DEFAULT '',
	report_number INTEGER NOT NULL DEFAULT 0,
	reported      BLOB NOT NULL DEFAULT x''
) STRICT, WITHOUT ROWID;

CREATE TABLE desired (
	device   TEXT PRIMARY KEY REFERENCES devices (name) ON DELETE CASCADE,
	number   INTEGER NOT NULL,
	sha256   BLOB NOT NULL CHECK (length(sha256) = 32),
	document BLOB NOT NULL
) STRICT;

CREATE TABLE versions (
	model      TEXT NOT NULL,
	version    INTEGER NOT NULL CHECK (version > 0),
	digest     TEXT NOT NULL,
	source     TEXT,
	size       INTEGER NOT NULL,
	inputs     TEXT NOT NULL,
	outputs    TEXT NOT NULL,
	opset      INTEGER NOT NULL,
	created_at INTEGER NOT NULL,
	created_by TEXT NOT NULL,
	PRIMARY KEY (model, version),
	UNIQUE (model, digest),
	UNIQUE (model, source)
) STRICT, WITHOUT ROWID;

CREATE TABLE objects (
	kind       TEXT NOT NULL,
	name       TEXT NOT NULL,
	yaml       TEXT NOT NULL,
	updated_at INTEGER NOT NULL,
	PRIMARY KEY (kind, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE rollouts (
	number       INTEGER PRIMARY KEY AUTOINCREMENT,
	deployment   TEXT NOT NULL,
	model        TEXT NOT NULL,
	from_version INTEGER NOT NULL,
	to_version   INTEGER NOT NULL,
	max_failed   INTEGER NOT NULL,
	deadline     INTEGER NOT NULL,
	state        INTEGER NOT NULL,
	reason       TEXT NOT NULL,
	started_at   INTEGER NOT NULL,
	ended_at     INTEGER NOT NULL
) STRICT;
CREATE INDEX rollouts_by_deployment ON rollouts (deployment, number);
CREATE UNIQUE INDEX rollouts_running ON rollouts (deployment) WHERE state = 1;

CREATE TABLE rollout_devices (
	rollout       INTEGER NOT NULL REFERENCES rollouts (number) ON DELETE CASCADE,
	device        TEXT NOT NULL,
	phase         INTEGER NOT NULL,
	reason        TEXT NOT NULL,
	bytes_present INTEGER NOT NULL,
	bytes_total   INTEGER NOT NULL,
	PRIMARY KEY (rollout, device)
) STRICT, WITHOUT ROWID;

CREATE TABLE outboxes (
	device        TEXT NOT NULL REFERENCES devices (name) ON DELETE CASCADE,
	outbox        TEXT NOT NULL,
	last_sequence INTEGER NOT NULL,
	heard_at      INTEGER NOT NULL,
	PRIMARY KEY (device, outbox)
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
	id          INTEGER PRIMARY KEY AUTOINCREMENT,
	device      TEXT NOT NULL REFERENCES devices (name) ON DELETE CASCADE,
	outbox      TEXT NOT NULL,
	sequence    INTEGER NOT NULL,
	received_at INTEGER NOT NULL,
	event       BLOB NOT NULL,
	UNIQUE (device, outbox, sequence)
) STRICT;
CREATE INDEX events_by_device ON events (device, id);
`, `
-- What the bundle tells, as JSON; NULL in rows that are older than the column.
ALTER TABLE versions ADD COLUMN bundle TEXT;
-- Bytes on the disk of a device; NULL: it has not said.
ALTER TABLE devices ADD COLUMN disk_free INTEGER;

CREATE TABLE profiles (
	device           TEXT NOT NULL REFERENCES devices (name) ON DELETE CASCADE,
	model            TEXT NOT NULL,
	version          INTEGER NOT NULL,
	digest           TEXT NOT NULL,
	firmware_profile TEXT NOT NULL,
	received_at      INTEGER NOT NULL,
	-- Of the profile, so that planning need not decode it: bytes, rows,
	-- nanoseconds and joules of one row.
	weights          INTEGER NOT NULL,
	session          INTEGER NOT NULL,
	fixed            INTEGER NOT NULL,
	row              INTEGER NOT NULL,
	batch            INTEGER NOT NULL,
	latency          INTEGER NOT NULL,
	joules           REAL NOT NULL,
	profile          BLOB NOT NULL,
	PRIMARY KEY (device, model, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX profiles_by_version ON profiles (model, digest);
CREATE TRIGGER profiles_of_version AFTER DELETE ON versions BEGIN
	DELETE FROM profiles WHERE model = old.model AND digest = old.digest;
END;
`, `
-- Devices are known by certificates.
CREATE TABLE authorities (
	id          TEXT PRIMARY KEY, -- pki.ID of its key, which is in a file
	certificate BLOB NOT NULL,
	cross_certs BLOB NOT NULL,    -- by which older ones vouch for it, DER, one after the other
	active      INTEGER NOT NULL, -- the one that issues
	created_at  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX authorities_active ON authorities (active) WHERE active = 1;

-- Rows stay when their device is forgotten, until they expire: what is revoked
-- stays so.
CREATE TABLE certificates (
	serial     BLOB PRIMARY KEY,
	device     TEXT NOT NULL,
	authority  TEXT NOT NULL,
	key        TEXT NOT NULL, -- pki.ID
	der        BLOB NOT NULL,
	not_after  INTEGER NOT NULL,
	issued_at  INTEGER NOT NULL,
	used_at    INTEGER NOT NULL DEFAULT 0, -- first connection with it
	revoked_at INTEGER NOT NULL DEFAULT 0,
	reason     TEXT NOT NULL DEFAULT ''
) STRICT, WITHOUT ROWID;
CREATE INDEX certificates_by_device ON certificates (device);

ALTER TABLE devices DROP COLUMN secret_hash;
ALTER TABLE devices DROP COLUMN broker_hash;
ALTER TABLE devices ADD COLUMN revoked_at INTEGER NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN revoked_reason TEXT NOT NULL DEFAULT '';
ALTER TABLE devices ADD COLUMN twins BLOB NOT NULL DEFAULT x''; -- an encoded DeviceIdentity with its twins only
ALTER TABLE devices ADD COLUMN trust_version INTEGER NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN root_ids TEXT NOT NULL DEFAULT '[]';

ALTER TABLE join_tokens ADD COLUMN device TEXT NOT NULL DEFAULT '';      -- for this one only
ALTER TABLE join_tokens ADD COLUMN broker_hash TEXT NOT NULL DEFAULT ''; -- as an external broker keeps it

ALTER TABLE users ADD COLUMN scope TEXT NOT NULL DEFAULT '{}';    -- labels
ALTER TABLE users ADD COLUMN password TEXT NOT NULL DEFAULT '';   -- argon2id, in the PHC form; '': none
ALTER TABLE users ADD COLUMN external INTEGER NOT NULL DEFAULT 0; -- signs in by OpenID Connect

ALTER TABLE tokens ADD COLUMN id TEXT NOT NULL DEFAULT '';
ALTER TABLE tokens ADD COLUMN comment TEXT NOT NULL DEFAULT '';
ALTER TABLE tokens ADD COLUMN role TEXT NOT NULL DEFAULT '';  -- '': the user's
ALTER TABLE tokens ADD COLUMN scope TEXT NOT NULL DEFAULT '{}';
ALTER TABLE tokens ADD COLUMN expires_at INTEGER NOT NULL DEFAULT 0; -- 0: never
ALTER TABLE tokens ADD COLUMN login INTEGER NOT NULL DEFAULT 0;      -- given for a password
ALTER TABLE tokens ADD COLUMN last_used_at INTEGER NOT NULL DEFAULT 0;
UPDATE tokens SET id = lower(hex(substr(hash, 1, 6)));
CREATE UNIQUE INDEX tokens_by_id ON tokens (id);
CREATE INDEX tokens_by_user ON tokens (user);

-- Each record has the hash of the one before in its own.
CREATE TABLE audit_log (
	number  INTEGER PRIMARY KEY,
	at      INTEGER NOT NULL,
	who     TEXT NOT NULL,
	action  TEXT NOT NULL,
	object  TEXT NOT NULL,
	refused INTEGER NOT NULL,
	before  TEXT NOT NULL,
	after   TEXT NOT NULL,
	reason  TEXT NOT NULL,
	source  TEXT NOT NULL, -- address
	count   INTEGER NOT NULL,
	hash    BLOB NOT NULL CHECK (length(hash) = 32)
) STRICT;

CREATE TABLE trust (
	version INTEGER PRIMARY KEY,
	signed  BLOB NOT NULL -- an encoded SignedTrust
) STRICT;

CREATE TABLE signatures (
	model      TEXT NOT NULL,
	digest     TEXT NOT NULL, -- of the bundle's manifest
	manifest   TEXT NOT NULL, -- digest of the signature's
	size       INTEGER NOT NULL, -- of the signature's manifest
	signer     TEXT NOT NULL, -- the key in the trust document, or else what the signature says
	created_at INTEGER NOT NULL,
	PRIMARY KEY (model, digest, manifest)
) STRICT, WITHOUT ROWID;
`, rolloutSchema + historySchema}

// alongside has what SQL alone cannot do: it runs after the migration of the
// same index, in its transaction.
var alongside = map[int]func(context.Context, *sql.Tx) error{2: chainAudit}
