-- A worker asks for work: it lives, and what it says of itself is taken down.
CREATE OR REPLACE FUNCTION whetstone.seen(
    p_worker text, p_device text, p_memory bigint, p_version text, p_bearer text,
    OUT worker_id bigint, OUT device text, OUT memory_bytes bigint, OUT draining boolean
) LANGUAGE sql AS $$
    INSERT INTO whetstone.workers AS w (name, device, memory_bytes, version, bearer)
    VALUES (p_worker, p_device, p_memory, p_version, p_bearer)
    ON CONFLICT (name) DO UPDATE SET last_seen = clock_timestamp(), bearer = excluded.bearer, stopped = false,
        device = coalesce(nullif(excluded.device, ''), w.device),
        version = coalesce(nullif(excluded.version, ''), w.version),
        memory_bytes = coalesce(excluded.memory_bytes, w.memory_bytes)
    RETURNING worker_id, device, memory_bytes, draining
$$;

-- What is known of a worker: whether it is drained, its memory, and for how many seconds it was not heard of.
CREATE OR REPLACE FUNCTION whetstone.worker(p_worker text) RETURNS json LANGUAGE sql STABLE AS $$
    SELECT json_build_object('draining', draining, 'memory_bytes', memory_bytes, 'bearer', bearer,
                             'stopped', stopped, 'silent_s', extract(epoch FROM clock_timestamp() - last_seen))
    FROM whetstone.workers WHERE name = p_worker
$$;
