//! Write one handler; run it on any queue; every message takes effect once.
