    operation pg_catalog.text;
    row_source pg_catalog.text;  -- where a row-level trigger has its row
    query pg_catalog.text;
    needed pg_catalog.text[];  -- the columns that the query reads
    fingerprint pg_catalog.text;  -- their names and types
    foreign_types boolean;
    missing pg_catalog.text;
    casts pg_catalog.text;
    source_columns pg_catalog.text;
    row_new pg_catalog.text;
    row_old pg_catalog.text;
    key_new pg_catalog.text;
    key_old pg_catalog.text;
    channel_new pg_catalog.text;
    channel_old pg_catalog.text;
    new_rows pg_catalog.text;
    old_rows pg_catalog.text;
    sources pg_catalog.text;
    lines pg_catalog.text;
    opening pg_catalog.text;
    closing pg_catalog.text;
    old_key pg_catalog.text;
    inserted pg_catalog.text;
    updated pg_catalog.text;
    deleted pg_catalog.text;
