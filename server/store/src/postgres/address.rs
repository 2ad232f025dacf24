//! Where the database is, who logs in and with which password: from a URL, a password file, or `PGPASSFILE`. Read once
//! at the start, by the thread that opens the store.
//!
//! Invariant: no text that leaves this file holds a password.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};

use super::errors::{OpenError, told};
use super::tls::Tls;

/// What PostgreSQL listens on unless told otherwise.
const PORT: u16 = 5432;
/// Time for one attempt to connect to one host, unless the URL says another.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that is gone is noticed after so long, unless the URL says another.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(10);
const VERIFY_FULL: &str = "sslmode=verify-full";
const VERIFY_CA: &str = "sslmode=verify-ca";
/// Name under which the server lists our sessions.
const APPLICATION: &str = "ringline";

/// A database that can be connected to.
#[derive(Clone)]
pub(super) struct Address {
    pub config: Config,
    /// `HOST:PORT/DATABASE as USER`, without the password.
    pub place: String,
    /// How the connection is encrypted; `None`: not at all.
    pub tls: Option<Tls>,
    /// The URL demands that the server proves who it is.
    is_verified: bool,
}

impl Address {
    /// Reads `url` (`postgres://…` or `key=value …`), and the password from `password_file` if the URL has none, else from
    /// the file that `PGPASSFILE` names, else from `~/.pgpass`.
    ///
    /// Whether it is encrypted is settled by [`Address::trust`]. Errors: `BadAddress`, `PasswordFile`, `Tls`.
    pub fn read(url: &str, password_file: Option<&Path>) -> Result<Self, OpenError> {
        if url.contains(VERIFY_CA) {
            return Err(OpenError::Tls(format!(
                "{VERIFY_CA} is not in this build: {VERIFY_FULL} looks at the name too"
            )));
        }
        let is_verified = url.contains(VERIFY_FULL);
        // What the library does not know is to it only that there is TLS.
        let known = url.replace(VERIFY_FULL, "sslmode=require");
        let mut config: Config = known.parse().map_err(|error| OpenError::BadAddress(told(&error)))?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(OpenError::BadAddress("it names no host".into()));
        }
        let user = match config.get_user() {
            Some(user) => user.to_owned(),
            None => return Err(OpenError::BadAddress("it names no user".into())),
        };
        let database = config.get_dbname().unwrap_or(&user).to_owned();
        // A server that only reads is none of ours: neither a standby nor a primary that was demoted.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite).application_name(APPLICATION);
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        let places = places(&config);
        if config.get_password().is_none() {
            let wanted: Vec<[&str; 4]> =
                places.iter().map(|(host, port)| [host.as_str(), port.as_str(), &database, &user]).collect();
            if let Some(password) = password(password_file, &wanted)? {
                config.password(password);
            }
        }
        let mut place = String::new();
        for (host, port) in &places {
            let comma = if place.is_empty() { "" } else { "," };
            let _ = write!(place, "{comma}{host}:{port}");
        }
        let _ = write!(place, "/{database} as {user}");
        Ok(Self { config, place, tls: None, is_verified })
    }

    /// Settles whether the way there is encrypted and whom to believe: who was signed by `ca`, a PEM file, or without one
    /// whoever answers. With a CA everything is encrypted and proven unless the URL says `sslmode=disable`; on a socket of
    /// this machine nothing is.
    ///
    /// Errors: `Tls`.
    pub fn trust(mut self, ca: Option<&Path>) -> Result<Self, OpenError> {
        let is_socket = |host: &Host| matches!(host, Host::Unix(_));
        let is_local = self.config.get_hostaddrs().is_empty() && self.config.get_hosts().iter().all(is_socket);
        let is_wanted = match self.config.get_ssl_mode() {
            SslMode::Disable => false,
            SslMode::Require => true,
            // Nothing was said.
            _ => ca.is_some(),
        };
        if self.is_verified && ca.is_none() {
            return Err(OpenError::Tls(format!("{VERIFY_FULL} needs postgres.ca: who may have signed the server")));
        }
        if is_local || !is_wanted {
            self.config.ssl_mode(SslMode::Disable);
            return Ok(self);
        }
        let place = ca.map_or_else(String::new, |ca| format!("postgres.ca: {}: ", ca.display()));
        self.tls = Some(Tls::load(ca).map_err(|reason| OpenError::Tls(format!("{place}{reason}")))?);
        self.config.ssl_mode(SslMode::Require);
        Ok(self)
    }

    /// Whether the way there leaves this machine and nothing hides what goes on it.
    pub fn is_open(&self) -> bool {
        self.tls.is_none() && self.is_remote()
    }

    /// Whether the way there leaves this machine.
    fn is_remote(&self) -> bool {
        let local = |host: &Host| match host {
            Host::Unix(_) => true,
            Host::Tcp(name) => {
                name == "localhost" || name.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
            }
        };
        !self.config.get_hosts().iter().all(local)
            || !self.config.get_hostaddrs().iter().all(std::net::IpAddr::is_loopback)
    }
}

/// An address as it may be shown: without a password, and with nothing at all of what has one in no known form.
pub fn without_password(url: &str) -> String {
    const HIDDEN: &str = "(not shown)";
    if let Some((scheme, rest)) = url.split_once("://") {
        // What comes behind may name the password as well.
        if rest.contains("password") {
            return HIDDEN.into();
        }
        // The last: a password may hold one that is not written as it should be.
        return match rest.rsplit_once('@') {
            None => url.to_owned(),
            Some((who, place)) => {
                let user = who.split(':').next().unwrap_or_default();
                format!("{scheme}://{user}@{place}")
            }
        };
    }
    if url.contains("password") { HIDDEN.into() } else { url.to_owned() }
}

/// Host and port of each place, as texts.
fn places(config: &Config) -> Vec<(String, String)> {
    let hosts: Vec<String> = match config.get_hosts() {
        [] => config.get_hostaddrs().iter().map(std::net::IpAddr::to_string).collect(),
        hosts => hosts
            .iter()
            .map(|host| match host {
                Host::Tcp(name) => name.clone(),
                Host::Unix(path) => path.display().to_string(),
            })
            .collect(),
    };
    let ports = config.get_ports();
    // One port is for all hosts.
    let port = |at: usize| ports.get(at).or(ports.first()).copied().unwrap_or(PORT).to_string();
    hosts.into_iter().enumerate().map(|(at, host)| (host, port(at))).collect()
}

fn password(file: Option<&Path>, wanted: &[[&str; 4]]) -> Result<Option<String>, OpenError> {
    let unreadable = |path: &Path, reason: String| OpenError::PasswordFile { path: path.display().to_string(), reason };
    if let Some(path) = file {
        check_rights(path).map_err(|reason| unreadable(path, reason))?;
        let text = fs::read_to_string(path).map_err(|error| unreadable(path, error.to_string()))?;
        return Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()));
    }
    let named = std::env::var_os("PGPASSFILE").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".pgpass"));
    let Some(path) = named.or_else(home).filter(|path| path.exists()) else { return Ok(None) };
    check_rights(&path).map_err(|reason| unreadable(&path, reason))?;
    let text = fs::read_to_string(&path).map_err(|error| unreadable(&path, error.to_string()))?;
    Ok(wanted.iter().find_map(|wanted| from_pgpass(&text, wanted)))
}

fn check_rights(path: &Path) -> Result<(), String> {
    let mode = fs::metadata(path).map_err(|error| error.to_string())?.mode();
    if mode & 0o077 == 0 { Ok(()) } else { Err("others may read it: chmod 600".into()) }
}

/// The password in the first line `host:port:database:user:password` that fits; `*` fits everything, `\` takes the next
/// character as it is. As libpq reads it; a place on a Unix socket is `localhost`.
fn from_pgpass(text: &str, wanted: &[&str; 4]) -> Option<String> {
    let host = if wanted[0].starts_with('/') { "localhost" } else { wanted[0] };
    let wanted = [host, wanted[1], wanted[2], wanted[3]];
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(fields).find_map(|fields| match fields.as_slice() {
        [given @ .., password] if given.len() == wanted.len() => {
            let fits = given.iter().zip(wanted).all(|(given, wanted)| given == "*" || given == wanted);
            fits.then(|| password.clone())
        }
        _ => None,
    })
}

fn fields(line: &str) -> Vec<String> {
    let (mut fields, mut field, mut escaped) = (Vec::new(), String::new(), false);
    for character in line.chars() {
        match character {
            _ if std::mem::take(&mut escaped) => field.push(character),
            '\\' => escaped = true,
            ':' => fields.push(std::mem::take(&mut field)),
            _ => field.push(character),
        }
    }
    fields.push(field);
    fields
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn places_are_told_without_the_password() {
        let address = Address::read("postgres://ann:s3cret@db1,db2:6000/chat", None).unwrap();
        assert_eq!(address.place, "db1:5432,db2:6000/chat as ann");
        assert_eq!(address.config.get_password(), Some(&b"s3cret"[..]));
        assert!(address.is_remote());
        let address = Address::read("host=/run/postgresql user=ann", None).unwrap();
        assert_eq!(address.place, "/run/postgresql:5432/ann as ann");
        assert!(!address.is_remote() && !Address::read("postgres://ann@127.0.0.1/x", None).unwrap().is_remote());
    }

    #[test]
    fn what_is_no_address_is_refused_without_its_password() {
        for url in ["", "postgres://:s3cret@", "host=x password=s3cret", "postgres://ann:s3cret@h/x?colour=red", "x y"]
        {
            let told = Address::read(url, None).err().unwrap().to_string();
            assert!(told.contains("postgres.url") && !told.contains("s3cret"), "{url}: {told}");
        }
    }

    #[test]
    fn what_is_asked_for_is_encrypted_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (none, empty) = (folder.path().join("none.pem"), folder.path().join("empty.pem"));
        fs::write(&empty, "").unwrap();
        let trust = |url: &str, ca: Option<&Path>| Address::read(url, None).and_then(|address| address.trust(ca));
        let has_tls = |url: &str| trust(url, None).unwrap().tls.is_some();
        assert!(has_tls("postgres://ann@h/x?sslmode=require") && has_tls("host=h user=ann sslmode=require"));
        for open in ["postgres://ann@h/x", "postgres://ann@h/x?sslmode=disable", "postgres://ann@h/x?sslmode=prefer"] {
            assert!(!has_tls(open) && trust(open, None).unwrap().is_open(), "{open}");
        }
        assert!(!has_tls("host=/run/postgresql user=ann sslmode=require"), "a socket of this machine");
        let told = |url: &str, ca: Option<&Path>| trust(url, ca).err().unwrap().to_string();
        assert!(told("postgres://ann@h/x?sslmode=verify-full", None).contains("needs postgres.ca"));
        assert!(told("postgres://ann@h/x?sslmode=verify-ca", None).contains("verify-full"));
        assert!(told("postgres://ann@h/x", Some(&none)).contains("none.pem"));
        assert!(told("postgres://ann@h/x?sslmode=verify-full", Some(&empty)).contains("holds no certificate"));
        assert!(trust("postgres://ann@h/x?sslmode=disable", Some(&none)).is_ok_and(|address| address.tls.is_none()));
    }

    #[test]
    fn what_is_shown_of_an_address_has_no_password() {
        let url = "postgres://ann:s3c:re@t@h/x?sslmode=disable";
        assert_eq!(without_password(url), "postgres://ann@h/x?sslmode=disable");
        for open in ["", "postgres://ann@h/x", "postgres://h/x", "host=h user=ann"] {
            assert_eq!(without_password(open), open);
        }
        for secret in ["host=h password = s3cret", "postgres://ann@h/x?password=s3cret"] {
            assert_eq!(without_password(secret), "(not shown)");
        }
    }

    #[test]
    fn passwords_come_from_files_that_others_cannot_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        fs::write(&path, "s3cret:\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let url = "postgres://ann@h/x";
        let told = Address::read(url, Some(&path)).err().unwrap().to_string();
        assert!(told.contains("chmod 600") && !told.contains("s3cret"), "{told}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let address = Address::read(url, Some(&path)).unwrap();
        assert_eq!(address.config.get_password(), Some(&b"s3cret:"[..]));
        let address = Address::read("postgres://ann:own@h/x", Some(&path)).unwrap();
        assert_eq!(address.config.get_password(), Some(&b"own"[..]), "what the URL says counts");
        assert!(Address::read(url, Some(&folder.path().join("none"))).is_err());
    }

    #[test]
    fn a_line_of_pgpass_fits_by_all_its_fields() {
        let text = "# all\nh:5432:other:ann:no\n*:5432:x:ann:a\\:b\\\\\nlocalhost:*:*:*:local\n";
        let find = |host, port, database, user| from_pgpass(text, &[host, port, database, user]);
        assert_eq!(find("h", "5432", "x", "ann").as_deref(), Some("a:b\\"));
        assert_eq!(find("/run/postgresql", "1", "y", "bob").as_deref(), Some("local"));
        assert_eq!(find("h", "5433", "x", "ann"), None);
    }
}
