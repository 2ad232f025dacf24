//! What is fuzzed of the configuration: any text is a configuration or an error that names what is wrong.
//!
//! Shared by the fuzz target and the test that replays its corpus.

use ringline::config::Config;

pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(text) {
        // What it says of itself is read back as the same.
        Ok(config) => {
            let own = Config::parse(&config.to_toml()).expect("its own words");
            assert_eq!(own.to_toml(), config.to_toml());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
