-- A host's generations, and the invalidations that shared tiers have not received yet.
-- Used by `host_database.py` and `host_state.py`.

-- name: meta
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value);

-- name: groups
CREATE TABLE IF NOT EXISTS groups (
    name TEXT PRIMARY KEY,
    changed INTEGER,
    renewed INTEGER,
    settled INTEGER
);

-- name: generations
CREATE TABLE IF NOT EXISTS generations (
    name TEXT,
    field TEXT,
    value TEXT,
    changed INTEGER,
    PRIMARY KEY (name, field)
);

-- name: journal
CREATE TABLE IF NOT EXISTS journal (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at INT,
    due INT,
    turns TEXT,
    note TEXT
);

-- name: groups_changed
CREATE INDEX IF NOT EXISTS groups_changed ON groups (changed);

-- name: lives
CREATE TABLE IF NOT EXISTS lives (name TEXT PRIMARY KEY, until INTEGER);

-- name: lives_until
CREATE INDEX IF NOT EXISTS lives_until ON lives (until);

-- name: touch
INSERT INTO groups VALUES (?, ?, ?, 0)
ON CONFLICT (name) DO UPDATE SET
    changed = excluded.changed,
    renewed = max(renewed, excluded.renewed);

-- name: counts
SELECT (SELECT count(*) FROM groups), (SELECT count(*) FROM journal);

-- name: prune_generations
DELETE FROM generations
WHERE name IN (SELECT name FROM groups ORDER BY changed LIMIT ?);

-- name: prune_groups
DELETE FROM groups
WHERE name IN (SELECT name FROM groups ORDER BY changed LIMIT ?);

-- name: prune_lives
DELETE FROM lives WHERE name NOT IN (SELECT name FROM groups);

-- name: extend_life
INSERT INTO lives VALUES (?, ?)
ON CONFLICT (name) DO UPDATE SET until = max(until, excluded.until);

-- name: expired_groups
SELECT name FROM lives WHERE until < ? ORDER BY until LIMIT ?;

-- name: names
SELECT name
FROM groups
WHERE name >= ?
    AND name < ?
    AND EXISTS (SELECT 1 FROM generations AS g WHERE g.name = groups.name AND g.field = '*')
ORDER BY name
LIMIT ?;
