//! `docker-opts`: from `subnet.env` to the options of Docker's daemon, as a file for its unit. What flannel's
//! `mk-docker-opts.sh` does, byte for byte (flannel: dist/mk-docker-opts.sh).

use std::{
    collections::BTreeMap,
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use crate::{
    atomic_file::{self, WriteError},
    subnet_env::subnet_in,
};

/// Variables with this prefix are options; those in the environment count as well.
const OPTION: &str = "DOCKER_OPT_";
/// The main routing table.
const ROUTES: &str = "/proc/net/route";

/// The command's options.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The agent's subnet.env
    #[arg(short = 'f', value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    flannel_env: PathBuf,
    /// The file to write
    #[arg(short = 'd', value_name = "FILE", default_value = "/run/docker_opts.env")]
    docker_env: PathBuf,
    /// Write each option as a variable, such as DOCKER_OPT_MTU; with neither -i nor -c, both
    #[arg(short = 'i')]
    individual: bool,
    /// Write all options as one variable
    #[arg(short = 'c')]
    combined: bool,
    /// Leave --ip-masq out, for an old Docker
    #[arg(short = 'm')]
    no_ip_masq: bool,
    /// Name of the variable with all options; what it has in the environment goes first
    #[arg(short = 'k', value_name = "NAME", default_value = "DOCKER_OPTS")]
    key: String,
}

/// The command could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum DockerOptsError {
    /// `subnet.env` is there and can't be read.
    #[error("read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// flannel's message for the same.
    #[error("Invalid value of FLANNEL_IPMASQ: {0}")]
    IpMasq(String),
    /// The file can't be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The same of one that is no ordinary file.
    #[error("write {path}: {source}")]
    WriteTo {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// flannel's message for the same. The file is written.
    #[error("Your routing table already contains the subnet: {0}")]
    Routed(String),
}

/// Writes the file.
///
/// # Errors
/// [`DockerOptsError`].
pub fn run(options: &Options) -> Result<(), DockerOptsError> {
    let path = &options.flannel_env;
    // Without the file there are no options from it, and that is no error.
    let env = match fs::read(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(DockerOptsError::Read { path: path.clone(), source: error });
        }
        text => String::from_utf8_lossy(&text.unwrap_or_default()).into_owned(),
    };
    let content = options.render(
        &env,
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))),
    )?;
    write(&options.docker_env, &content)?;
    let routes = fs::read_to_string(ROUTES).unwrap_or_default();
    match subnet_in(&env).and_then(|subnet| route_to(subnet, &routes)) {
        Some(route) => Err(DockerOptsError::Routed(route)),
        None => Ok(()),
    }
}

impl Options {
    /// The file's content, for the content of `subnet.env` and an environment.
    fn render(
        &self,
        env: &str,
        environment: impl Iterator<Item = (String, String)>,
    ) -> Result<String, DockerOptsError> {
        let mut variables: BTreeMap<String, String> = environment.collect();
        for line in env.lines() {
            if let Some((name, value)) = line.trim().split_once('=') {
                variables.insert(name.to_owned(), unquoted(value).to_owned());
            }
        }
        let value = |name: &str| variables.get(name).map(String::as_str).filter(|value| !value.is_empty());
        // In alphabetical order, as the shell lists its variables.
        let mut options: BTreeMap<&str, String> = variables
            .iter()
            .filter(|(name, _)| name.starts_with(OPTION))
            .map(|(name, value)| (name.as_str(), value.clone()))
            .collect();
        if let Some(subnet) = value("FLANNEL_SUBNET") {
            options.insert("DOCKER_OPT_BIP", format!("--bip={subnet}"));
        }
        if let Some(mtu) = value("FLANNEL_MTU") {
            options.insert("DOCKER_OPT_MTU", format!("--mtu={mtu}"));
        }
        match value("FLANNEL_IPMASQ").filter(|_| !self.no_ip_masq) {
            None => {}
            // One of the two masquerades.
            Some("true") => drop(options.insert("DOCKER_OPT_IPMASQ", "--ip-masq=false".to_owned())),
            Some("false") => drop(options.insert("DOCKER_OPT_IPMASQ", "--ip-masq=true".to_owned())),
            Some(other) => return Err(DockerOptsError::IpMasq(other.to_owned())),
        }
        let both = self.individual == self.combined;
        let mut content = String::new();
        let mut combined = value(&self.key).map(|given| format!("{given} ")).unwrap_or_default();
        for (name, option) in options {
            if self.individual || both {
                content += &format!("{name}=\"{option}\"\n");
            }
            combined += &format!(" {option}");
        }
        if self.combined || both {
            content += &format!("{}=\"{combined}\"\n", self.key);
        }
        Ok(content)
    }
}

fn unquoted(value: &str) -> &str {
    let quoted = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
    quoted('"').or_else(|| quoted('\'')).unwrap_or(value)
}

fn write(path: &Path, content: &str) -> Result<(), DockerOptsError> {
    // A terminal or a pipe has no place that another file could take.
    if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
        return fs::write(path, content).map_err(|source| DockerOptsError::WriteTo { path: path.to_owned(), source });
    }
    Ok(atomic_file::write(path, content.as_bytes(), 0o644)?)
}

/// A route to exactly that subnet by a gateway, in `ip route`'s words. Docker's bridge would take its traffic away.
fn route_to(subnet: ipnet::Ipv4Net, table: &str) -> Option<String> {
    table.lines().skip(1).find_map(|line| {
        // Iface Destination Gateway Flags RefCnt Use Metric Mask ...; the addresses in the machine's byte order.
        let fields: Vec<&str> = line.split_whitespace().collect();
        let address = |index: usize| {
            let number = u32::from_str_radix(fields.get(index)?, 16).ok()?;
            Some(Ipv4Addr::from(number.to_ne_bytes()))
        };
        let (destination, gateway, mask) = (address(1)?, address(2)?, address(7)?);
        let is_subnet = destination == subnet.network() && mask == subnet.netmask();
        (is_subnet && !gateway.is_unspecified()).then(|| format!("{subnet} via {gateway} dev {}", fields[0]))
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    const ENV: &str =
        "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn render(arguments: &str, env: &str, environment: &[(&str, &str)]) -> Result<String, String> {
        let line = Line::try_parse_from(std::iter::once("x").chain(arguments.split_whitespace())).expect("valid");
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        line.options.render(env, environment).map_err(|error| error.to_string())
    }

    /// What `dist/mk-docker-opts.sh` writes for the same, run with dash.
    #[test]
    fn flannels_bytes() {
        let individual = "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\n\
                          DOCKER_OPT_MTU=\"--mtu=1472\"\n";
        let all = " --bip=10.1.74.1/24 --ip-masq=true --mtu=1472\"\n";
        for (arguments, golden) in [
            ("", format!("{individual}DOCKER_OPTS=\"{all}")),
            ("-i", individual.to_owned()),
            ("-c", format!("DOCKER_OPTS=\"{all}")),
            ("-i -c", format!("{individual}DOCKER_OPTS=\"{all}")),
            ("-k CUSTOM_KEY", format!("{individual}CUSTOM_KEY=\"{all}")),
            (
                "-m",
                "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n\
                 DOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n"
                    .to_owned(),
            ),
        ] {
            assert_eq!(render(arguments, ENV, &[]), Ok(golden), "{arguments}");
        }
    }

    #[test]
    fn what_the_environment_has_counts_too() {
        let environment = [("DOCKER_OPTS", "--debug"), ("DOCKER_OPT_LOG", "--log-level=warn"), ("FLANNEL_MTU", "9000")];
        assert_eq!(
            render("", "FLANNEL_IPMASQ=true\n", &environment).expect("rendered"),
            "DOCKER_OPT_IPMASQ=\"--ip-masq=false\"\nDOCKER_OPT_LOG=\"--log-level=warn\"\nDOCKER_OPT_MTU=\"--mtu=9000\"\n\
             DOCKER_OPTS=\"--debug  --ip-masq=false --log-level=warn --mtu=9000\"\n"
        );
    }

    #[test]
    fn without_a_subnet_env_there_are_no_options() {
        assert_eq!(render("", "", &[]), Ok("DOCKER_OPTS=\"\"\n".to_owned()));
    }

    #[test]
    fn a_bad_ip_masq_is_refused_unless_left_out() {
        let bad = "FLANNEL_IPMASQ=yes\n";
        assert_eq!(render("", bad, &[]), Err("Invalid value of FLANNEL_IPMASQ: yes".to_owned()));
        assert_eq!(render("-m -c", bad, &[]), Ok("DOCKER_OPTS=\"\"\n".to_owned()));
    }

    #[test]
    fn a_route_by_a_gateway_is_found() {
        let hex = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
        let table = |gateway| {
            format!(
                "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                 eth0\t{}\t{}\t0003\t0\t0\t0\t{}\t0\t0\t0\n",
                hex([10, 1, 74, 0]),
                hex(gateway),
                hex([255, 255, 255, 0])
            )
        };
        let subnet: ipnet::Ipv4Net = "10.1.74.0/24".parse().expect("CIDR");
        let route = Some("10.1.74.0/24 via 10.0.0.1 dev eth0".to_owned());
        assert_eq!(route_to(subnet, &table([10, 0, 0, 1])), route);
        assert_eq!(route_to(subnet, &table([0, 0, 0, 0])), None);
        assert_eq!(route_to("10.1.74.0/25".parse().expect("CIDR"), &table([10, 0, 0, 1])), None);
        assert_eq!(route_to(subnet, "garbage\n\n1 2 3\n"), None);
    }
}
