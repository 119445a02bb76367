//! Each flag with the value that counts, and where it is from.

use clap::{ArgAction, CommandFactory as _};

use super::Cli;

/// Where a value is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Origin {
    /// The command line.
    Flag,
    /// The environment.
    Variable,
    /// Neither.
    Default,
}

impl Origin {
    /// In words.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Flag => "flag",
            Self::Variable => "variable",
            Self::Default => "default",
        }
    }
}

/// A flag.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Setting {
    /// Its name, with dashes.
    pub flag: String,
    /// The variable that counts where it is not given.
    pub variable: String,
    /// Empty for none.
    pub value: String,
    /// Where the value is from.
    pub origin: Origin,
}

impl Cli {
    /// All flags of the daemon, in the order of its help.
    pub fn settings(&self) -> Vec<Setting> {
        let definition = Self::command();
        let known = definition.get_arguments().filter_map(|known| Some((known, known.get_long()?)));
        let setting = |(known, name): (&clap::Arg, &str)| {
            let given: Vec<_> = self.given.iter().filter(|flag| flag.name == name && !flag.value.is_empty()).collect();
            let given = match known.get_action() {
                ArgAction::Append => &given[..],
                _ => &given[given.len().saturating_sub(1)..],
            };
            let origin = match given.last() {
                None => Origin::Default,
                Some(flag) if flag.written.starts_with('-') => Origin::Flag,
                Some(_) => Origin::Variable,
            };
            let values: Vec<_> = match origin {
                Origin::Default if name == "subnet-file" => vec![self.subnet_file().to_string_lossy().into_owned()],
                Origin::Default => {
                    known.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect()
                }
                _ => given.iter().map(|flag| flag.value.to_string_lossy().into_owned()).collect(),
            };
            let variable = super::arguments::variable(name);
            Setting { flag: format!("--{name}"), variable, value: values.join(","), origin }
        };
        known.filter(|(_, name)| !matches!(*name, "version" | "help")).map(setting).collect()
    }

    /// The daemon's flags as they were given, for a process of the same program: as arguments, and what must not be seen in the
    /// list of processes as variables.
    pub fn passed_on(&self) -> (Vec<std::ffi::OsString>, Vec<(String, std::ffi::OsString)>) {
        let is_secret = |name: &str| name == "etcd-password";
        let (secret, open): (Vec<_>, Vec<_>) = self.given.iter().partition(|flag| is_secret(&flag.name));
        let argument = |flag: &&super::arguments::Given| {
            let mut argument = std::ffi::OsString::from(format!("--{}=", flag.name));
            argument.push(&flag.value);
            argument
        };
        let variables = secret.iter().map(|flag| (super::arguments::variable(&flag.name), flag.value.clone()));
        (open.iter().map(argument).collect(), variables.collect())
    }
}
