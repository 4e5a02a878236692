//! What AWS documents and no emulator does, as scripted answers: without a network, on a paused clock.

mod dead_letters;
mod errors;
mod order;
mod receiving;
mod script;
mod sending;
mod settling;
