//! Public conformance suites for any onlyonce source and store.
