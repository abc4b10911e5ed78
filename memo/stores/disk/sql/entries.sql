-- Statements of the disk tier on the table of `diskcache`, used by `index.py` and `disk_tier.py`.
-- A half-open range of keys selects the entries of a function or of a namespace.

-- name: by_name
CREATE INDEX IF NOT EXISTS Cache_filename ON Cache (filename) WHERE filename IS NOT NULL;

-- name: code_table
CREATE TABLE IF NOT EXISTS Codes (
    function TEXT, code TEXT, PRIMARY KEY (function, code)
) WITHOUT ROWID;

-- name: codes
SELECT code FROM Codes WHERE function = ?;

-- name: note_code
INSERT OR IGNORE INTO Codes VALUES (?, ?);

-- name: forget_codes
DELETE FROM Codes WHERE function = ?;

-- name: insert
INSERT OR IGNORE INTO Cache (
    store_time, expire_time, access_time, access_count, tag, size, mode, filename, value, key, raw
) VALUES (?, ?, ?, 0, ?, ?, ?, ?, ?, ?, 1);

-- name: update
UPDATE Cache
SET store_time = ?,
    expire_time = ?,
    access_time = ?,
    access_count = 0,
    tag = ?,
    size = ?,
    mode = ?,
    filename = ?,
    value = ?
WHERE key = ? AND raw = 1;

-- name: expired
SELECT rowid, filename, size + coalesce(length(value), 0)
FROM Cache
WHERE expire_time < ?
ORDER BY expire_time
LIMIT ?;

-- name: least
SELECT rowid, filename, size + coalesce(length(value), 0)
FROM Cache
WHERE ?
ORDER BY access_time
LIMIT ?;

-- name: free_space
SELECT rowid, filename, size + coalesce(length(value), 0)
FROM Cache
ORDER BY access_time;

-- name: replace
UPDATE Cache
SET access_time = ?
WHERE key >= ?
    AND key < ?
    AND raw = 1
    AND substr(tag, instr(tag, ' ') + 1) <> ?
    AND access_time > ?;

-- name: replaced
SELECT rowid, filename FROM Cache WHERE access_time < ? ORDER BY access_time LIMIT ?;

-- name: most
SELECT rowid, filename
FROM Cache NOT INDEXED
WHERE rowid < ? AND key >= ? AND key < ? AND raw = 1
ORDER BY rowid DESC
LIMIT ?;

-- name: delete_most
DELETE FROM Cache NOT INDEXED
WHERE rowid >= ? AND rowid < ? AND key >= ? AND key < ? AND raw = 1;

-- name: is_most
SELECT
    2 * (SELECT count(*) FROM Cache WHERE key >= ? AND key < ? AND raw = 1)
    > (SELECT count(*) FROM Cache);

-- name: list
SELECT key, value, filename, size, store_time
FROM Cache
WHERE key > ? AND key >= ? AND key < ? AND raw = 1 AND mode = 1
ORDER BY key
LIMIT ?;

-- name: newest_of_all
SELECT key, value, filename, size, store_time
FROM Cache
WHERE rowid IN (
    SELECT rowid
    FROM Cache NOT INDEXED
    WHERE key >= ? AND key < ? AND raw = 1 AND mode = 1
    ORDER BY store_time DESC
    LIMIT ?
)
ORDER BY store_time DESC;

-- name: newest_of_some
SELECT key, value, filename, size, store_time
FROM Cache
WHERE rowid IN (
    SELECT rowid
    FROM Cache INDEXED BY Cache_key_raw
    WHERE key >= ? AND key < ? AND raw = 1 AND mode = 1
    ORDER BY store_time DESC
    LIMIT ?
)
ORDER BY store_time DESC;
