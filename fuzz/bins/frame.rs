//! Fuzzes `frame` of `targets/wire.rs`.

#![no_main]

#[allow(dead_code)]
#[path = "../targets/wire.rs"]
mod wire;

libfuzzer_sys::fuzz_target!(|data: &[u8]| wire::frame(data));
