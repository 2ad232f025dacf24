//! Tokens: the issuer key, what `ringline token` prints, and what a LOGIN by token must show.
//!
//! EdDSA (Ed25519) and nothing else, whatever a token's header says. The key is that of the data directory, made once and
//! never replaced, or a file that `auth.issuer` names, which nodes of a cluster share. A private key that others can read is
//! refused. Verification runs on the workers and shares nothing mutable.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, EncodePrivateKey, EncodePublicKey};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, encode};
use ringline_schema::ids::UserName;
use serde::{Deserialize, Serialize};

use crate::config::Config;

/// PKCS#8 PEM, mode 0600.
pub const ISSUER_FILE: &str = "issuer.pem";
/// SPKI PEM: what other verifiers are given.
pub const ISSUER_PUBLIC_FILE: &str = "issuer.pub.pem";
/// How far the clocks of issuer and server may be apart.
const LEEWAY_S: u64 = 5;
/// Larger key files are not keys.
const KEY_FILE_BYTES_MAX: u64 = 16 * 1024;

/// Why a key can't be used. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    #[error("cannot {what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{0} can be read by others (mode {1:o}): the key may be known; chmod 600 it, or delete it for a new key")]
    Exposed(PathBuf, u32),
    #[error("{0} is no Ed25519 key in PEM: {1}")]
    NotAKey(PathBuf, String),
    #[error("cannot sign a token: {0}")]
    Sign(String),
    #[error("auth.issuer: {0}")]
    Named(Box<AuthError>),
}

/// What a token says.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    sub: String,
    aud: String,
    iat: u64,
    exp: u64,
}

/// The text of a new key's two files.
pub struct KeyPair {
    /// For [`ISSUER_FILE`], readable by its owner alone.
    pub private: String,
    /// For [`ISSUER_PUBLIC_FILE`].
    pub public: String,
}

impl KeyPair {
    /// A new key. Errors: [`AuthError::Sign`], when it has no text, which none of them is known to lack.
    pub fn generate() -> Result<Self, AuthError> {
        let key = SigningKey::from_bytes(&rand::random());
        let failed = |error: String| AuthError::Sign(error);
        let private = key.to_pkcs8_pem(LineEnding::LF).map_err(|error| failed(error.to_string()))?;
        let public = key.verifying_key().to_public_key_pem(LineEnding::LF).map_err(|e| failed(e.to_string()))?;
        Ok(Self { private: private.to_string(), public })
    }
}

/// The node's own signing key.
pub struct Issuer {
    key: SigningKey,
}

impl Issuer {
    /// The key that a configuration means; that of the data directory is made when it is not there. True: it was made now.
    ///
    /// Errors: [`AuthError`]; a file that `auth.issuer` names must be there.
    pub fn of(config: &Config) -> Result<(Self, bool), AuthError> {
        if config.auth_issuer.is_empty() {
            return Self::open_or_create(&config.data_dir);
        }
        Self::named(config).map(|issuer| (issuer, false))
    }

    /// The key that a configuration means, which must be there. Errors: `Io` with `NotFound` when that of the data
    /// directory was not made yet.
    pub fn existing(config: &Config) -> Result<Self, AuthError> {
        if config.auth_issuer.is_empty() { Self::open(&Self::file_of(config)) } else { Self::named(config) }
    }

    fn named(config: &Config) -> Result<Self, AuthError> {
        Self::open(&Self::file_of(config)).map_err(|error| AuthError::Named(Box::new(error)))
    }

    fn file_of(config: &Config) -> PathBuf {
        match config.auth_issuer.as_str() {
            "" => config.data_dir.join(ISSUER_FILE),
            named => PathBuf::from(named),
        }
    }

    fn open_or_create(data_dir: &Path) -> Result<(Self, bool), AuthError> {
        let path = data_dir.join(ISSUER_FILE);
        match Self::open(&path) {
            Err(AuthError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            outcome => return Ok((outcome?, false)),
        }
        let KeyPair { private, public } = KeyPair::generate()?;
        write_new(&data_dir.join(ISSUER_PUBLIC_FILE), public.as_bytes(), 0o644)?;
        // The private one last: it alone says that the pair is whole.
        write_new(&path, private.as_bytes(), 0o600)?;
        sync_folder(data_dir)?;
        Self::open(&path).map(|issuer| (issuer, true))
    }

    /// Reads a key file. Errors: `Io` with `NotFound` when there is none.
    pub fn open(path: &Path) -> Result<Self, AuthError> {
        let pem = read_small(path)?;
        let metadata = path.metadata().map_err(io("read", path))?;
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(AuthError::Exposed(path.to_owned(), mode));
        }
        let not_a_key = |error: String| AuthError::NotAKey(path.to_owned(), error);
        let key = SigningKey::from_pkcs8_pem(&pem).map_err(|error| not_a_key(error.to_string()))?;
        Ok(Self { key })
    }

    /// A token for a user, valid from now for `ttl`.
    pub fn token(&self, user: &UserName, audience: &str, ttl: Duration) -> Result<String, AuthError> {
        let iat = unix_s();
        let exp = iat.saturating_add(ttl.as_secs());
        let claims = Claims { sub: user.as_str().to_owned(), aud: audience.to_owned(), iat, exp };
        self.sign(&claims)
    }

    fn sign(&self, claims: &impl Serialize) -> Result<String, AuthError> {
        let der = self.key.to_pkcs8_der().map_err(|error| AuthError::Sign(error.to_string()))?;
        let key = EncodingKey::from_ed_der(der.as_bytes());
        encode(&Header::new(Algorithm::EdDSA), claims, &key).map_err(|error| AuthError::Sign(error.to_string()))
    }

    fn public_key(&self) -> DecodingKey {
        DecodingKey::from_ed_der(self.key.verifying_key().as_bytes())
    }
}

/// Checks tokens of the node's own issuer and of outside ones.
pub struct Verifier {
    keys: Vec<DecodingKey>,
    validation: Validation,
}

impl Verifier {
    /// `public_keys`: PEM files of outside issuers.
    pub fn new(issuer: &Issuer, public_keys: &[String], audience: &str) -> Result<Self, AuthError> {
        let mut keys = vec![issuer.public_key()];
        for path in public_keys {
            let path = Path::new(path);
            let pem = read_small(path)?;
            let key = DecodingKey::from_ed_pem(pem.as_bytes())
                .map_err(|error| AuthError::NotAKey(path.to_owned(), error.to_string()))?;
            keys.push(key);
        }
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_audience(&[audience]);
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY_S;
        Ok(Self { keys, validation })
    }

    /// Whether the token was signed by a known issuer, is for this server and this user, and is valid now.
    pub fn verify(&self, token: &str, user: &UserName) -> bool {
        self.keys.iter().any(|key| {
            decode::<Subject>(token, key, &self.validation).is_ok_and(|token| token.claims.sub == user.as_str())
        })
    }

    #[cfg(test)]
    pub fn for_tests() -> Self {
        let issuer = Issuer { key: SigningKey::from_bytes(&[7; 32]) };
        Self::new(&issuer, &[], "ringline").unwrap()
    }
}

#[derive(Deserialize)]
struct Subject {
    sub: String,
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> AuthError {
    move |source| AuthError::Io { what, path: path.to_owned(), source }
}

fn read_small(path: &Path) -> Result<String, AuthError> {
    let length = path.metadata().map_err(io("read", path))?.len();
    if length > KEY_FILE_BYTES_MAX {
        return Err(AuthError::NotAKey(path.to_owned(), format!("{length} bytes are too many")));
    }
    std::fs::read_to_string(path).map_err(io("read", path))
}

/// Writes and syncs a file under another name first, so that no crash leaves half a key.
fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), AuthError> {
    let draft = path.with_extension("draft");
    match std::fs::remove_file(&draft) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(io("replace", &draft)(error)),
        _ => {}
    }
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft).map_err(io("create", &draft))?;
    file.set_permissions(Permissions::from_mode(mode)).map_err(io("create", &draft))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io("write", &draft))?;
    std::fs::rename(&draft, path).map_err(io("create", path))
}

fn sync_folder(folder: &Path) -> Result<(), AuthError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io("sync", folder))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ann() -> UserName {
        UserName::new("ann").unwrap()
    }

    fn issuer() -> Issuer {
        Issuer { key: SigningKey::from_bytes(&[7; 32]) }
    }

    fn verifies(token: &str) -> bool {
        Verifier::for_tests().verify(token, &ann())
    }

    fn signed(claims: serde_json::Value) -> String {
        issuer().sign(&claims).unwrap()
    }

    #[test]
    fn a_token_opens_for_its_user_only() {
        let token = issuer().token(&ann(), "ringline", Duration::from_secs(60)).unwrap();
        assert!(verifies(&token));
        assert!(!Verifier::for_tests().verify(&token, &UserName::new("bob").unwrap()));
    }

    #[test]
    fn every_claim_is_needed_and_checked() {
        let (now, later) = (unix_s(), unix_s() + 600);
        assert!(verifies(&signed(json!({"sub": "ann", "aud": "ringline", "exp": later}))));
        for bad in [
            json!({"sub": "ann", "aud": "ringline", "exp": now - LEEWAY_S - 60}),
            json!({"sub": "ann", "aud": "ringline"}),
            json!({"sub": "ann", "aud": "elsewhere", "exp": later}),
            json!({"sub": "ann", "exp": later}),
            json!({"aud": "ringline", "exp": later}),
            json!({"sub": "bob", "aud": "ringline", "exp": later}),
            json!({"sub": 7, "aud": "ringline", "exp": later}),
            json!({"sub": "ann", "aud": "ringline", "exp": "soon"}),
            json!({"sub": "ann", "aud": "ringline", "exp": later, "nbf": later}),
            json!({}),
        ] {
            assert!(!verifies(&signed(bad.clone())), "{bad}");
        }
    }

    #[test]
    fn only_this_algorithm_and_this_key_count() {
        let claims = json!({"sub": "ann", "aud": "ringline", "exp": unix_s() + 600});
        let other = Issuer { key: SigningKey::from_bytes(&[8; 32]) };
        assert!(!verifies(&other.sign(&claims).unwrap()), "another key");
        // The classic confusion: the public key used as a shared secret.
        let key = issuer().key.verifying_key();
        let pem = key.to_public_key_pem(LineEnding::LF).unwrap();
        for secret in [pem.as_bytes(), key.as_bytes()] {
            let token = encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(secret)).unwrap();
            assert!(!verifies(&token), "HS256");
        }
        let good = signed(claims);
        let [_, body, signature] = *good.split('.').collect::<Vec<_>>() else { panic!("three parts") };
        // {"alg":"none"} and {"alg":"none","typ":"JWT"}
        for none in ["eyJhbGciOiJub25lIn0", "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0"] {
            for token in [format!("{none}.{body}."), format!("{none}.{body}.{signature}"), format!("{none}.{body}")] {
                assert!(!verifies(&token), "{token}");
            }
        }
        for cut in 0..good.len() {
            assert!(!verifies(&good[..cut]), "cut at {cut}");
        }
        assert!(!verifies("") && !verifies("...") && !verifies("garbage") && !verifies(&"x".repeat(2048)));
    }

    #[test]
    fn the_key_is_made_once_private_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (made, new) = Issuer::open_or_create(folder.path()).unwrap();
        assert!(new);
        let (kept, new) = Issuer::open_or_create(folder.path()).unwrap();
        assert!(!new);
        assert_eq!(made.key.to_bytes(), kept.key.to_bytes());
        let path = folder.path().join(ISSUER_FILE);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let error = Issuer::open_or_create(folder.path()).err().unwrap().to_string();
        assert!(error.contains("mode 640") && error.contains("chmod 600"), "{error}");
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").unwrap();
        assert!(matches!(Issuer::open_or_create(folder.path()), Err(AuthError::NotAKey(..))), "never replaced");
    }

    #[test]
    fn a_key_that_the_configuration_names_is_used_and_never_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shared.pem");
        let data_dir = folder.path().join("data");
        let mut config = Config::default();
        (config.auth_issuer, config.data_dir) = (path.display().to_string(), data_dir.clone());
        let error = Issuer::of(&config).err().unwrap().to_string();
        assert!(error.contains("auth.issuer: cannot read") && error.contains("shared.pem"), "{error}");
        assert!(!path.exists() && !data_dir.exists(), "nothing is made");
        std::fs::write(&path, KeyPair::generate().unwrap().private).unwrap();
        let error = Issuer::of(&config).err().unwrap().to_string();
        assert!(error.contains("can be read by others"), "{error}");
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let token = Issuer::of(&config).unwrap().0.token(&ann(), "ringline", Duration::from_secs(60)).unwrap();
        let (again, made) = Issuer::of(&config).unwrap();
        assert!(!made && Verifier::new(&again, &[], "ringline").unwrap().verify(&token, &ann()));
        assert_eq!(Issuer::file_of(&config), path);
        config.auth_issuer.clear();
        assert_eq!(Issuer::file_of(&config), data_dir.join(ISSUER_FILE));
    }

    #[test]
    fn an_outside_issuer_is_known_by_its_public_key_file() {
        let (home, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (own, _) = Issuer::open_or_create(home.path()).unwrap();
        let (other, _) = Issuer::open_or_create(outside.path()).unwrap();
        let token = other.token(&ann(), "ringline", Duration::from_secs(60)).unwrap();
        assert!(!Verifier::new(&own, &[], "ringline").unwrap().verify(&token, &ann()));
        let file = outside.path().join(ISSUER_PUBLIC_FILE).to_string_lossy().into_owned();
        assert!(Verifier::new(&own, &[file], "ringline").unwrap().verify(&token, &ann()));
        let private = outside.path().join(ISSUER_FILE).to_string_lossy().into_owned();
        assert!(Verifier::new(&own, &[private], "ringline").is_err(), "a private key is no public key");
        assert!(Verifier::new(&own, &["/nowhere.pem".into()], "ringline").is_err());
    }
}
