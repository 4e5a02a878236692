//! SQLite for onlyonce: dedup store, transactions that carry effects, and an embedded durable queue.
