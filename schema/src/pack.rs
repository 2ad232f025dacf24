//! Compact bytes of small values inside records and index rows: numbers of variable length, texts with their length.
//!
//! Fields are only ever appended, and a field that is missing at the end reads as 0 or empty: so an old value reads
//! with a new program. Nothing read here can panic, and nothing allocates more than there are bytes.

use crate::ids::UserName;

/// Bytes that end early, or hold what can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a packed value is damaged: {0}")]
pub struct BadPack(pub &'static str);

/// Appends values.
#[derive(Clone, Debug, Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// Seven bits a byte, lowest first.
    pub fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    pub fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    pub fn names(&mut self, names: &[UserName]) {
        self.number(names.len() as u64);
        names.iter().for_each(|name| self.text(name.as_str()));
    }
}

/// Reads them back in the same order.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// 0 at the end of the bytes.
    pub fn number(&mut self) -> Result<u64, BadPack> {
        if self.0.is_empty() {
            return Ok(0);
        }
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or(BadPack("number"))?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(BadPack("number"))
    }

    pub fn small(&mut self) -> Result<u8, BadPack> {
        u8::try_from(self.number()?).map_err(|_| BadPack("small number"))
    }

    /// Empty at the end of the bytes.
    pub fn bytes(&mut self) -> Result<&'a [u8], BadPack> {
        let length = usize::try_from(self.number()?).map_err(|_| BadPack("length"))?;
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(BadPack("length"))?;
        self.0 = rest;
        Ok(bytes)
    }

    pub fn text(&mut self) -> Result<&'a str, BadPack> {
        std::str::from_utf8(self.bytes()?).map_err(|_| BadPack("text"))
    }

    pub fn name(&mut self) -> Result<UserName, BadPack> {
        UserName::new(self.text()?).map_err(|_| BadPack("name"))
    }

    pub fn names(&mut self) -> Result<Vec<UserName>, BadPack> {
        let count = self.number()?;
        // Each name takes at least two bytes, so a count of more is damage and not a reason to reserve room.
        if count > self.0.len() as u64 {
            return Err(BadPack("count of names"));
        }
        (0..count).map(|_| self.name()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn values_read_back_and_garbage_never_panics(
            numbers in prop::collection::vec(any::<u64>(), 0..10),
            text in "[a-z]{1,20}",
            garbage in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let name = UserName::new(&text).unwrap();
            let mut out = Writer::default();
            numbers.iter().for_each(|&number| out.number(number));
            out.names(std::slice::from_ref(&name));
            out.text(&text);
            let mut reader = Reader(&out.0);
            for &number in &numbers {
                prop_assert_eq!(reader.number(), Ok(number));
            }
            prop_assert_eq!(reader.names(), Ok(vec![name]));
            prop_assert_eq!(reader.text(), Ok(&text[..]));
            prop_assert_eq!((reader.number(), reader.text()), (Ok(0), Ok("")));
            let mut reader = Reader(&garbage);
            let _ = (reader.names(), reader.number(), reader.bytes(), reader.text(), reader.small());
        }
    }
}
