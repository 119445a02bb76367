//! What is wrong with a command line.

/// A command line that can't be acted on.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// Go's message for the same.
    #[error("bad flag syntax: {0}")]
    Syntax(String),
    /// No flag of that name.
    #[error("unknown flag {written}{}; flannel-agent --help lists them", .meant.as_ref().map(|meant| format!(" (did you mean {meant}?)")).unwrap_or_default())]
    Unknown {
        /// As it was written.
        written: String,
        /// One that is alike, written the same way.
        meant: Option<String>,
    },
    /// The last argument is a flag that has one.
    #[error("{0} needs a value, as in {0}=VALUE")]
    NoValue(String),
    /// It is not one of the flag's or variable's.
    #[error("invalid value {value:?} for {written}: {reason}")]
    Value {
        /// As it was written.
        written: String,
        /// Its value.
        value: String,
        /// What is expected.
        reason: String,
    },
    /// A switch with something behind it that looks like its value.
    #[error("unexpected argument {value:?}: the value of {written} goes behind \"=\", as in {written}={value}")]
    SwitchValue {
        /// As it was written.
        written: String,
        /// What is behind it.
        value: String,
    },
    /// Neither a flag nor a command.
    #[error("unexpected argument {argument:?}: {hint}")]
    Argument {
        /// What it is.
        argument: String,
        /// What is expected.
        hint: String,
    },
    /// A flag of the daemon's behind a command.
    #[error("{written} is no flag of the command {command}; flannel-agent {command} --help lists them")]
    NotOfCommand {
        /// As it was written.
        written: String,
        /// The command.
        command: String,
    },
    /// Something of flannel's that this agent does not have.
    #[error("{written}: {what}")]
    Unsupported {
        /// As it was written.
        written: String,
        /// What it is, and what to do.
        what: &'static str,
    },
    /// A certificate without its key, or the other way round. flannel would go on in clear text.
    #[error("{given} is given without {missing}: TLS to etcd takes both, or neither")]
    Identity {
        /// As it was written.
        given: String,
        /// What else is needed.
        missing: &'static str,
    },
    /// clap's own, of a command; or help.
    #[error("{0}")]
    Clap(#[from] clap::Error),
}

impl UsageError {
    /// Says it, and ends the process.
    pub(super) fn exit(self) -> ! {
        const USAGE: i32 = 2;
        match self {
            Self::Clap(error) => error.exit(),
            error => {
                eprintln!("error: {error}");
                std::process::exit(USAGE)
            }
        }
    }
}
