//! Arguments and variables in the form that clap reads, from the form that Go's `flag` package and flannel read
//! (Go: flag/flag.go; flannel: main.go).
//!
//! One dash is as good as two, and no letter is a flag of its own. A switch has its value behind `=`. A flag that is
//! given again counts as it is given last. An empty text is none.

use std::{
    ffi::{OsStr, OsString},
    iter::Peekable,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
};

use clap::{
    Arg, ArgAction, Command,
    error::{ContextKind, ContextValue},
};

use super::{UsageError, flannels};
use crate::{go_values, suggestion};

/// Commands that ask of the store what the daemon would, and look at what the daemon is told.
const TAKING_ALL: [&str; 4] = ["doctor", "bundle", "show", "validate"];

/// A flag with its value.
#[derive(Clone, Debug)]
pub(super) struct Given {
    /// Its name, without dashes.
    pub(super) name: String,
    /// As the operator wrote it: with their dashes, or the variable.
    pub(super) written: String,
    pub(super) value: OsString,
}

/// A command line.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    pub(super) flags: Vec<Given>,
    /// A command with all that follows it, as clap reads it. Empty for the daemon.
    pub(super) command: Vec<OsString>,
    /// Help is asked for.
    pub(super) help: bool,
}

impl Arguments {
    /// Reads the arguments behind the program's name.
    ///
    /// # Errors
    /// What is no flag, or has no value that can be read.
    pub(super) fn read(definition: &Command, args: impl Iterator<Item = OsString>) -> Result<Self, UsageError> {
        let mut arguments = Self::default();
        let mut args = args.peekable();
        while let Some(arg) = args.next() {
            let Some(flag) = Flag::of(&arg)? else {
                return arguments.end_with(definition, arg, args);
            };
            if flag.is_help() {
                arguments.help = true;
                return Ok(arguments);
            }
            let Some(known) = definition.get_arguments().find(|known| known.get_long() == Some(&flag.name)) else {
                return Err(unknown(flag.written, definition.get_arguments()));
            };
            let given = flag.with_value(known, &mut args)?;
            check(definition, &given)?;
            arguments.flags.push(given);
        }
        Ok(arguments)
    }

    /// What is no flag ends the flags.
    fn end_with(
        mut self,
        definition: &Command,
        arg: OsString,
        mut rest: Peekable<impl Iterator<Item = OsString>>,
    ) -> Result<Self, UsageError> {
        if arg == "--" && rest.peek().is_none() {
            return Ok(self);
        }
        if arg == "help" {
            self.command = std::iter::once(arg).chain(rest).collect();
            return Ok(self);
        }
        if let Some(command) = definition.find_subcommand(&arg) {
            self.command = command_line(definition, command, arg, rest, &mut self.flags)?;
            return Ok(self);
        }
        let argument = arg.to_string_lossy().into_owned();
        // Go takes it for the end of the flags, and flannel passes over all that follows.
        if let Some(Given { name, written, value }) = self.flags.last()
            && value == "true"
            && definition.get_arguments().any(|known| known.get_long() == Some(name) && known.is_require_equals_set())
            && go_values::boolean(&argument).is_ok()
        {
            return Err(UsageError::SwitchValue { written: written.clone(), value: argument });
        }
        let commands: Vec<_> = definition.get_subcommands().map(Command::get_name).collect();
        Err(UsageError::Argument {
            hint: suggestion::closest(&argument, commands.iter().copied())
                .map(|name| format!("did you mean {name}?"))
                .unwrap_or_else(|| format!("flags begin with a dash, and the commands are {}", commands.join(", "))),
            argument,
        })
    }
}

/// Variables for flags that are not given, and what is wrong with those that can't be used: as with flannel, each costs
/// only itself.
pub(super) fn variables(
    definition: &Command,
    given: &[Given],
    variable: impl Fn(&str) -> Option<OsString>,
) -> (Vec<Given>, Vec<String>) {
    let (mut found, mut notices) = (Vec::new(), Vec::new());
    for known in definition.get_arguments() {
        let Some(name) = known.get_long().filter(|name| !matches!(*name, "version" | "help")) else { continue };
        if given.iter().any(|flag| flag.name == name) {
            continue;
        }
        let written = self::variable(name);
        let Some(value) = variable(&written).filter(|value| !value.is_empty()) else { continue };
        let flag = Given { name: name.to_owned(), written, value };
        match check(definition, &flag) {
            Ok(()) => found.push(flag),
            Err(error) => notices.push(format!("{error}; going on without it")),
        }
    }
    (found, notices)
}

/// The name of a flag's variable.
pub(super) fn variable(flag: &str) -> String {
    format!("FLANNELD_{}", flag.to_uppercase().replace(['-', '.'], "_"))
}

/// For clap: of a flag that is given again the last, unless it is one that may be repeated; of what is left, empty texts are
/// left out.
pub(super) fn for_clap<'a>(definition: &Command, given: &'a [Given]) -> impl Iterator<Item = OsString> + use<'a> {
    let repeatable: Vec<_> = definition
        .get_arguments()
        .filter(|known| matches!(known.get_action(), ArgAction::Append))
        .filter_map(|known| known.get_long().map(str::to_owned))
        .collect();
    let counts = move |(index, flag): &(usize, &Given)| {
        repeatable.contains(&flag.name) || given[index + 1..].iter().all(|later| later.name != flag.name)
    };
    given
        .iter()
        .enumerate()
        .filter(counts)
        .map(|(_, flag)| flag)
        .filter(|flag| !flag.value.is_empty())
        .map(Given::for_clap)
}

impl Given {
    fn for_clap(&self) -> OsString {
        let mut argument = OsString::from(format!("--{}=", self.name));
        argument.push(&self.value);
        argument
    }
}

/// What begins with a dash.
struct Flag {
    name: String,
    written: String,
    value: Option<OsString>,
}

impl Flag {
    fn of(arg: &OsStr) -> Result<Option<Self>, UsageError> {
        let bytes = arg.as_bytes();
        if bytes.len() < 2 || bytes[0] != b'-' || bytes == b"--" {
            return Ok(None);
        }
        let dashes = if bytes[1] == b'-' { 2 } else { 1 };
        let equals = bytes.iter().position(|byte| *byte == b'=');
        let (written, value) = match equals {
            Some(index) => (&bytes[..index], Some(OsString::from_vec(bytes[index + 1..].to_vec()))),
            None => (bytes, None),
        };
        let written = String::from_utf8_lossy(written).into_owned();
        match written.get(dashes..) {
            Some(name) if !name.is_empty() && !name.starts_with('-') => {
                Ok(Some(Self { name: name.to_owned(), written, value }))
            }
            _ => Err(UsageError::Syntax(arg.to_string_lossy().into_owned())),
        }
    }

    fn is_help(&self) -> bool {
        matches!(self.name.as_str(), "help" | "h")
    }

    fn with_value(self, known: &Arg, args: &mut impl Iterator<Item = OsString>) -> Result<Given, UsageError> {
        let Self { name, written, value } = self;
        let value = match value {
            Some(value) => value,
            None if known.is_require_equals_set() => OsString::from("true"),
            None => args.next().ok_or_else(|| UsageError::NoValue(written.clone()))?,
        };
        Ok(Given { name, written, value })
    }
}

/// Whether a flag has this value, by itself.
fn check(definition: &Command, given: &Given) -> Result<(), UsageError> {
    // As a template leaves it: not given. Go refuses it of numbers and switches.
    if given.value.is_empty() {
        return Ok(());
    }
    let Err(error) = definition.clone().try_get_matches_from([OsString::from("x"), given.for_clap()]) else {
        return Ok(());
    };
    let reason = match (error.get(ContextKind::ValidValue), std::error::Error::source(&error)) {
        (Some(ContextValue::Strings(values)), _) if !values.is_empty() => format!("expected {}", values.join(" or ")),
        (_, Some(source)) => source.to_string(),
        (_, None) => error.kind().to_string(),
    };
    let value = given.value.to_string_lossy().into_owned();
    Err(UsageError::Value { written: given.written.clone(), value, reason })
}

fn unknown<'a>(written: String, known: impl Iterator<Item = &'a Arg>) -> UsageError {
    let name = written.trim_start_matches('-');
    if let Some(what) = flannels::former(name) {
        return UsageError::Unsupported { written, what };
    }
    let dashes = &written[..written.len() - name.len()];
    let meant = suggestion::closest(name, known.filter_map(Arg::get_long));
    UsageError::Unknown { meant: meant.map(|meant| format!("{dashes}{meant}")), written }
}

/// A command with what follows it, with long names behind two dashes. The daemon's flags go to `flags`, where the command takes them.
fn command_line(
    root: &Command,
    command: &Command,
    name: OsString,
    args: impl Iterator<Item = OsString>,
    flags: &mut Vec<Given>,
) -> Result<Vec<OsString>, UsageError> {
    let (mut command, mut line) = (command, vec![name]);
    let mut args = args;
    while let Some(arg) = args.next() {
        let Some(flag) = Flag::of(&arg)? else {
            if let Some(next) = command.find_subcommand(&arg) {
                command = next;
            }
            line.push(arg);
            continue;
        };
        let own = || command.get_arguments().chain(root.get_arguments().filter(|known| known.is_global_set()));
        let short = flag.written.strip_prefix('-').filter(|rest| !rest.starts_with('-'));
        let short = short.and_then(|rest| rest.chars().next());
        let of_root = root.get_arguments().find(|known| known.get_long() == Some(&flag.name));
        if let Some(known) = command.get_arguments().find(|known| known.get_long() == Some(&flag.name)) {
            if known.get_action().takes_values() {
                let given = flag.with_value(known, &mut args)?;
                line.extend((!given.value.is_empty()).then(|| given.for_clap()));
            } else {
                line.push(format!("--{}", flag.name).into());
            }
        } else if let Some(known) =
            of_root.filter(|known| known.is_global_set() || TAKING_ALL.contains(&command.get_name()))
        {
            let given = flag.with_value(known, &mut args)?;
            check(root, &given)?;
            flags.push(given);
        } else if let Some(known) = own().find(|known| short.is_some() && known.get_short() == short) {
            let is_alone = arg.len() == 2;
            line.push(arg);
            if is_alone && known.get_action().takes_values() {
                line.extend(args.next());
            }
        } else if flag.is_help() {
            line.push("--help".into());
        } else if of_root.is_some() {
            return Err(UsageError::NotOfCommand { written: flag.written, command: command.get_name().to_owned() });
        } else {
            return Err(unknown(flag.written, own()));
        }
    }
    Ok(line)
}
