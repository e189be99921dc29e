-- The demo's two tables. This file runs at every start, in several workers at the same time.

-- A lock, because CREATE TABLE IF NOT EXISTS is not safe in two sessions: both may find no table, and one then fails.
SELECT pg_advisory_xact_lock(hashtext('flask_pg_sse demo schema'));

-- One row: the number of changes of the board. See next_version() in orders.py.
CREATE TABLE IF NOT EXISTS demo_board (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    version bigint NOT NULL
);

CREATE TABLE IF NOT EXISTS demo_order (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    dish text NOT NULL,
    quantity integer NOT NULL CHECK (quantity BETWEEN 1 AND 9),
    customer text NOT NULL,
    note text NOT NULL,
    status text NOT NULL CHECK (status IN ('new', 'cooking', 'ready', 'collected')),
    version bigint NOT NULL UNIQUE,
    changed_at timestamptz NOT NULL DEFAULT now()
);

-- At the very first start only: three sample orders.
WITH first_start AS (
    INSERT INTO demo_board (version) VALUES (3) ON CONFLICT DO NOTHING RETURNING version
)
INSERT INTO demo_order (dish, quantity, customer, note, status, version)
SELECT sample.* FROM first_start, (VALUES
    ('Lemon tart', 1, 'Noor', '', 'ready', 1),
    ('Mushroom ramen', 2, 'Ada', 'extra chilli, please', 'cooking', 2),
    ('Margherita', 1, 'Linus', 'no basil', 'new', 3)
) AS sample;
