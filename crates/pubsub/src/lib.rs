//! Google Pub/Sub for onlyonce.
