//! What Google documents and its emulator does not, as scripted answers: without a network, on a paused clock.

mod itself;
mod script;
