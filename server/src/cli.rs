//! The command line. Everything here runs once, on the main thread.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ringline_client::chat::{self, ChatOptions, ProofSource};
use ringline_schema::ids::UserName;

use crate::auth::{AuthError, Issuer};
use crate::boot::{self, BootError};
use crate::certs::{self, CertsCommand};
use crate::cluster_cli::{self, ClusterCommand};
use crate::config::Config;
use crate::store_cli::{self, StoreCommand};
use crate::{doctor, logs, node};

/// Exit code of a command that could not begin or failed.
const EXIT_FAILED: u8 = 1;
/// The longest life of a token.
const TTL_S_MAX: u64 = 10 * 365 * 86_400;

/// An instant-messaging server: one binary, one thread per core, what it accepts is on disk.
#[derive(Debug, Parser)]
#[command(name = "ringline", version, about, arg_required_else_help = true, args_override_self = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server until SIGINT or SIGTERM.
    Serve(ConfigArgs),
    /// Chat at the terminal.
    Chat(ChatArgs),
    /// Print a login token for a user, signed with the server's key (auth.issuer, or that of the data folder).
    Token(TokenArgs),
    /// Check this machine: what was found, why it matters, the command that mends it. Exits with 1 if something fails.
    Doctor(DoctorArgs),
    /// Check, repair, export (of a stopped server) or back up (also of a running one) the data folder.
    #[command(subcommand)]
    Store(StoreCommand),
    /// Make the certificates that nodes of a cluster show each other.
    #[command(subcommand)]
    Certs(CertsCommand),
    /// Look at a running cluster.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Print the configuration.
    Config(ConfigCommand),
    /// Print the version.
    Version,
}

/// Where settings come from. Later ones win: defaults, --config, RINGLINE_* variables, flags.
#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// TOML file; `ringline config --defaults` prints one.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address that clients connect to (net.listen).
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<String>,
    /// Folder of everything that is kept (data_dir).
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Cores to run on: all, a count like 2, or a list like 0-3,8 (cores).
    #[arg(long, value_name = "CORES")]
    cores: Option<String>,
    /// Least important messages to log: error, warn, info, debug, trace (log.level).
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
    /// Any key of the configuration; may be given more than once.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Args)]
struct ConfigCommand {
    /// A commented TOML file of all keys with their defaults.
    #[arg(long, conflicts_with = "show")]
    defaults: bool,
    /// Every key with its effective value and where it came from.
    #[arg(long)]
    show: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Debug, Args)]
struct DoctorArgs {
    /// One JSON object instead of the table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Debug, Args)]
struct TokenArgs {
    /// The user that may log in with it.
    #[arg(long)]
    user: String,
    /// How long it is valid: 90s, 30m, 12h, 7d.
    #[arg(long, default_value = "1h", value_parser = parse_ttl)]
    ttl: Duration,
    #[command(flatten)]
    config: ConfigArgs,
}

#[derive(Debug, Args)]
struct ChatArgs {
    /// The server's HOST:PORT.
    #[arg(long, default_value = "127.0.0.1:9700")]
    server: String,
    #[arg(long)]
    user: String,
    /// Register the user first.
    #[arg(long)]
    register: bool,
    /// Read the password from the first line of a file.
    #[arg(long, value_name = "FILE", conflicts_with = "password_stdin")]
    password_file: Option<PathBuf>,
    /// Read the password from the first line of the standard input.
    #[arg(long)]
    password_stdin: bool,
    /// Log in with the token in the first line of a file, as `ringline token` prints it, instead of a password.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["password_stdin", "password_file", "register"])]
    token_file: Option<PathBuf>,
    /// Where this device's id is kept.
    #[arg(long, value_name = "FILE")]
    device_file: Option<PathBuf>,
}

/// Runs the command line. Errors are one line on the standard error.
pub fn run() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Serve(args) => serve(&args),
        Command::Chat(args) => chat_at_terminal(args),
        Command::Token(args) => print_token(&args),
        Command::Doctor(args) => examine(&args),
        Command::Store(command) => store_cli::run(command),
        Command::Certs(command) => certs::run(&command),
        Command::Cluster(command) => cluster_cli::run(&command),
        Command::Config(args) => print_config(&args),
        Command::Version => {
            println!("ringline {}", env!("CARGO_PKG_VERSION"));
            Ok(0)
        }
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(line) => {
            eprintln!("ringline: {line}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

impl ConfigArgs {
    pub(crate) fn load(&self) -> Result<(Config, Vec<String>), String> {
        let mut flags = Vec::new();
        for pair in &self.set {
            let error = || crate::config::ConfigError::NotAPair(pair.clone()).to_string();
            let (key, value) = pair.split_once('=').ok_or_else(error)?;
            flags.push((key.trim().to_owned(), value.trim().to_owned(), "--set"));
        }
        let own = [
            (&self.listen, "net.listen", "--listen"),
            (&self.data_dir, "data_dir", "--data-dir"),
            (&self.cores, "cores", "--cores"),
            (&self.log, "log.level", "--log"),
        ];
        for (value, key, flag) in own {
            if let Some(value) = value {
                flags.push((key.to_owned(), value.clone(), flag));
            }
        }
        // A variable that is no Unicode is none of ours.
        let environment =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Config::load(self.config.as_deref(), environment, &flags).map_err(|error| error.to_string())
    }
}

fn serve(args: &ConfigArgs) -> Result<u8, String> {
    let (config, strangers) = args.load()?;
    logs::start(&config);
    for name in strangers {
        tracing::warn!("the variable {name} names no key of the configuration");
    }
    node::serve(config).map_err(|error: BootError| error.to_string())
}

fn examine(args: &DoctorArgs) -> Result<u8, String> {
    let (config, _) = args.config.load()?;
    let cores = boot::pick_cores(&config.cores).map_err(|error| error.to_string())?;
    let report = doctor::examine(&config, &cores);
    let mut out = std::io::stdout().lock();
    let text =
        if args.json { report.json().map_err(|error| error.to_string())? } else { report.table(out.is_terminal()) };
    // A reader that has gone away has read enough.
    let _ = out.write_all(text.as_bytes());
    Ok(report.exit_code())
}

fn print_config(args: &ConfigCommand) -> Result<u8, String> {
    if args.defaults {
        print!("{}", Config::default().to_toml());
        return Ok(0);
    }
    let (config, strangers) = args.config.load()?;
    print!("{}", if args.show { config.show() } else { config.to_toml() });
    for name in strangers {
        eprintln!("ringline: the variable {name} names no key of the configuration");
    }
    Ok(0)
}

fn print_token(args: &TokenArgs) -> Result<u8, String> {
    let (config, _) = args.config.load()?;
    let user = UserName::new(&args.user).map_err(|code| code.text().to_owned())?;
    let issuer = Issuer::existing(&config).map_err(|error| match error {
        AuthError::Io { source, path, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            format!("{} does not exist: start the server once to make it, or give its --data-dir", path.display())
        }
        other => other.to_string(),
    })?;
    let token = issuer.token(&user, &config.auth_audience, args.ttl).map_err(|error| error.to_string())?;
    println!("{token}");
    Ok(0)
}

fn chat_at_terminal(args: ChatArgs) -> Result<u8, String> {
    let proof = match (args.token_file, args.password_file, args.password_stdin) {
        (Some(file), ..) => ProofSource::TokenFile(file),
        (None, Some(file), _) => ProofSource::File(file),
        (None, None, true) => ProofSource::Stdin,
        (None, None, false) => ProofSource::Ask,
    };
    let ChatArgs { server, user, register, device_file, .. } = args;
    let options = ChatOptions { server, user, register, proof, device_file };
    chat::run(options).map(|()| 0).map_err(|error| error.to_string())
}

/// `90s`, `30m`, `12h`, `7d`; a bare number is seconds.
fn parse_ttl(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit_s = match text.get(digits.len()..) {
        Some("" | "s") => 1,
        Some("m") => 60,
        Some("h") => 3_600,
        Some("d") => 86_400,
        _ => return Err("use s, m, h or d, like 12h".to_owned()),
    };
    let count: u64 = digits.parse().map_err(|_| "use a whole number and s, m, h or d, like 12h".to_owned())?;
    match count.checked_mul(unit_s) {
        Some(seconds) if (1..=TTL_S_MAX).contains(&seconds) => Ok(Duration::from_secs(seconds)),
        _ => Err("a token is valid for 1 second to 10 years".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn times_to_live() {
        assert_eq!(parse_ttl("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_ttl("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_ttl("30m"), Ok(Duration::from_secs(1_800)));
        assert_eq!(parse_ttl("7d"), Ok(Duration::from_secs(604_800)));
        for bad in ["", "h", "0s", "-1h", "1w", "1.5h", "4000d", "99999999999999999999d"] {
            assert!(parse_ttl(bad).is_err(), "{bad}");
        }
    }
}
