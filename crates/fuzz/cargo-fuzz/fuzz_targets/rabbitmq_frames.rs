#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::rabbitmq_frames(data));
