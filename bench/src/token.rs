//! Login tokens: the generator signs with the server's own issuer key, so no user has to be registered first.
//!
//! Used by the main thread only, before the clock of a run starts.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde::Serialize;

use crate::Failure;

/// Whom the tokens are for, as the server demands it.
const AUDIENCE: &str = "ringline";
/// How long a token is good; a run logs in at its start only.
const LIFE: Duration = Duration::from_secs(3_600);
/// Issued this much in the past, for a server whose clock is behind.
const CLOCK_SKEW: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    aud: &'a str,
    iat: u64,
    exp: u64,
}

/// The key that the server trusts.
pub struct Issuer {
    key: EncodingKey,
}

impl Issuer {
    /// Reads an Ed25519 private key, PKCS#8 in PEM. The error says how to get one.
    pub fn load(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let pem = std::fs::read(path).map_err(|error| {
            Failure::Failed(format!(
                "cannot read the issuer key {shown} ({error}): the server writes it as issuer.pem into its data folder \
                 at its first start, readable by its own user only; pass its place by --issuer-key"
            ))
        })?;
        let key = EncodingKey::from_ed_pem(&pem).map_err(|error| {
            Failure::Failed(format!(
                "{shown} is not an Ed25519 private key in PKCS#8 PEM ({error}): pass the issuer.pem that the server \
                 wrote into its data folder"
            ))
        })?;
        Ok(Self { key })
    }

    /// One token a user name, all good for an hour from now.
    pub fn tokens(&self, users: &[String]) -> Result<Vec<String>, Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (iat, exp) = (now.saturating_sub(CLOCK_SKEW).as_secs(), (now + LIFE).as_secs());
        let header = Header::new(Algorithm::EdDSA);
        let sign = |user: &String| encode(&header, &Claims { sub: user, aud: AUDIENCE, iat, exp }, &self.key);
        let tokens: Result<_, _> = users.iter().map(sign).collect();
        tokens.map_err(|error| Failure::Failed(format!("cannot sign a login token: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::SigningKey;
    use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
    use ed25519_dalek::pkcs8::{EncodePrivateKey, EncodePublicKey};
    use jsonwebtoken::{DecodingKey, Validation, decode};

    #[test]
    fn a_token_is_verified_by_the_public_half() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("issuer.pem");
        let key = SigningKey::from_bytes(&[7; 32]);
        std::fs::write(&path, key.to_pkcs8_pem(LineEnding::LF).unwrap().as_bytes()).unwrap();
        let tokens = Issuer::load(&path).unwrap().tokens(&["bench-000001".to_owned()]).unwrap();

        let public = key.verifying_key().to_public_key_pem(LineEnding::LF).unwrap();
        let mut rules = Validation::new(Algorithm::EdDSA);
        rules.set_audience(&["ringline"]);
        let public = DecodingKey::from_ed_pem(public.as_bytes()).unwrap();
        let claims = decode::<serde_json::Value>(&tokens[0], &public, &rules).unwrap().claims;
        assert_eq!(claims["sub"], "bench-000001");
        assert!(claims["exp"].as_u64().unwrap() > claims["iat"].as_u64().unwrap());
    }

    #[test]
    fn a_missing_or_wrong_key_file_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let missing = Issuer::load(&folder.path().join("none.pem")).err().unwrap().to_string();
        assert!(missing.contains("none.pem") && missing.contains("--issuer-key"), "{missing}");
        let path = folder.path().join("bad.pem");
        std::fs::write(&path, "no key").unwrap();
        let wrong = Issuer::load(&path).err().unwrap().to_string();
        assert!(wrong.contains("PKCS#8"), "{wrong}");
    }
}
