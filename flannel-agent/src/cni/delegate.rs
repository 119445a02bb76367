//! Running another plugin (CNI SPEC.md, "Plugin Delegation"): the variables are this plugin's own, its standard error too.
#![expect(clippy::disallowed_types, reason = "delegates are programs; the agent itself does not come here")]

use std::{
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use serde_json::Value;

use super::{
    delegate_conf::DelegateConf,
    error::Error,
    request::{Attachment, Operation},
};

/// Address management by DHCP takes its time; runtimes wait for some minutes.
const LIMIT: Duration = Duration::from_secs(90);

/// A plugin that was found.
#[derive(Clone, Debug)]
pub struct Delegate {
    name: String,
    file: PathBuf,
    limit: Duration,
}

impl Delegate {
    /// Looks for it in the directories of `CNI_PATH`.
    ///
    /// # Errors
    /// [`Error::DelegateMissing`], or [`Error::Network`] where the name leads elsewhere.
    pub fn find(name: &str, path: &[PathBuf]) -> Result<Self, Error> {
        if name.is_empty() || name.contains('/') || name == ".." {
            return Err(Error::Network(format!("invalid plugin name: {name}")));
        }
        let file = path.iter().map(|directory| directory.join(name)).find(|file| is_program(file));
        let missing = || Error::DelegateMissing { plugin: name.to_owned(), path: path.to_vec() };
        Ok(Self { name: name.to_owned(), file: file.ok_or_else(missing)?, limit: LIMIT })
    }

    /// Runs it for this process's own container, and returns what it printed.
    ///
    /// # Errors
    /// [`Error::Delegate`] with its error result, and [`Error::DelegateSilent`], [`Error::DelegateHangs`], [`Error::Io`].
    pub fn run(&self, operation: Operation, conf: &DelegateConf) -> Result<Vec<u8>, Error> {
        self.start(Command::new(&self.file).env("CNI_COMMAND", operation.name()), conf)
    }

    /// Has it detach a container whose namespace is gone.
    ///
    /// # Errors
    /// As [`Delegate::run`].
    pub fn detach(&self, attachment: &Attachment, conf: &DelegateConf) -> Result<(), Error> {
        let mut command = Command::new(&self.file);
        command.env("CNI_COMMAND", Operation::Del.name());
        command.env("CNI_CONTAINERID", &attachment.container_id).env("CNI_IFNAME", &attachment.ifname);
        command.env_remove("CNI_NETNS").env_remove("CNI_ARGS");
        self.start(&mut command, conf).map(drop)
    }

    fn start(&self, command: &mut Command, conf: &DelegateConf) -> Result<Vec<u8>, Error> {
        let failed = |call| move |source| Error::Io { call, subject: self.file.display().to_string(), source };
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed("start the plugin"))?;
        let (mut input, mut output) = (child.stdin.take(), child.stdout.take());
        let bytes = conf.to_bytes();
        let (sender, receiver) = mpsc::channel();
        // On a thread of its own, which is left alone where the plugin hangs.
        thread::spawn(move || {
            let mut printed = Vec::new();
            // One that reads no input has ended, and says why on its output.
            let _unread = input.take().map(|mut input| input.write_all(&bytes));
            let read = output.as_mut().map_or(Ok(0), |output| output.read_to_end(&mut printed));
            let _gone = sender.send(read.map(|_| printed));
        });
        let printed: io::Result<Vec<u8>> = match receiver.recv_timeout(self.limit) {
            Ok(printed) => printed,
            Err(_) => {
                let _ended = child.kill();
                let _reaped = child.wait();
                return Err(Error::DelegateHangs { plugin: self.name.clone(), limit: self.limit });
            }
        };
        let status = child.wait().map_err(failed("wait for the plugin"))?;
        let printed = printed.map_err(failed("read from the plugin"))?;
        let plugin = self.name.clone();
        if status.success() {
            return Ok(printed);
        }
        Err(if is_error_result(&printed) {
            Error::Delegate { plugin, result: printed }
        } else {
            Error::DelegateSilent { plugin, status: status.to_string() }
        })
    }
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

fn is_error_result(printed: &[u8]) -> bool {
    serde_json::from_slice::<Value>(printed).is_ok_and(|value| value.get("code").is_some_and(Value::is_u64))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn conf() -> DelegateConf {
        DelegateConf::parse(br#"{"type":"x","name":"n"}"#).expect("valid")
    }

    fn plugin(script: &str) -> (tempfile::TempDir, Delegate) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let file = directory.path().join("x");
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("chmod");
        let path = [PathBuf::from("/nonexistent"), directory.path().to_owned()];
        let delegate = Delegate::find("x", &path).expect("found");
        (directory, delegate)
    }

    #[test]
    fn it_gets_the_command_and_its_configuration() {
        let (_directory, delegate) = plugin(r#"printf '%s ' "$CNI_COMMAND"; cat"#);
        let printed = delegate.run(Operation::Add, &conf()).expect("ran");
        assert_eq!(String::from_utf8_lossy(&printed), r#"ADD {"type":"x","name":"n"}"#);
    }

    #[test]
    fn its_error_result_is_handed_on_as_it_is() {
        let result = r#"{ "code": 7,"msg":"no" , "x":1}"#;
        let (_directory, delegate) = plugin(&format!("echo '{result}'; exit 3"));
        let error = delegate.run(Operation::Add, &conf()).expect_err("failed");
        assert_eq!(error.to_result("1.0.0"), format!("{result}\n").as_bytes());
    }

    #[test]
    fn one_that_says_nothing_is_spoken_for() {
        for script in ["kill -9 $$", "echo oops; exit 1", "echo '{}'; exit 1"] {
            let (_directory, delegate) = plugin(script);
            assert_eq!(delegate.run(Operation::Add, &conf()).expect_err("failed").code(), 100, "{script}");
        }
    }

    #[test]
    fn one_that_hangs_is_ended() {
        let (_directory, delegate) = plugin("exec sleep 60");
        let delegate = Delegate { limit: Duration::from_millis(50), ..delegate };
        assert_eq!(delegate.run(Operation::Add, &conf()).expect_err("ended").code(), 11);
    }

    #[test]
    fn one_that_is_not_there() {
        let missing = |name: &str| Delegate::find(name, &["/usr".into()]).expect_err("missing");
        assert_eq!(missing("no-such").to_string(), r#"failed to find plugin "no-such" in path [/usr]"#);
        assert_eq!(missing("no-such").code(), 5);
        // A directory.
        assert_eq!(missing("lib").code(), 5);
        assert_eq!(missing("../bin/true").code(), 7);
    }
}
