//! A headless Chromium in a namespace, asked over the DevTools protocol.
//!
//! The protocol goes over two pipes (`--remote-debugging-pipe`: JSON that ends with a zero byte, commands at descriptor 3 and answers at
//! descriptor 4), so that it needs no port and no WebSocket.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD as BASE64};
use serde_json::{Value, json};
use tempfile::TempDir;
use xtask::{lab::Netns, progress::wait_for};

use crate::world::SOON;

/// What a browser is told that is to show one page and ask nobody else anything.
const FLAGS: [&str; 11] = [
    "--headless",
    "--hide-scrollbars",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
];
/// Its standard input and output become the pipes; it prints nothing that is of interest.
const AS_PIPES: &str = r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1"#;

/// A browser with one page. Ends when dropped.
pub struct Browser {
    child: Child,
    commands: ChildStdin,
    answers: Receiver<Value>,
    last: u64,
    session: Option<String>,
    _profile: TempDir,
}

impl Browser {
    /// Opens an address, with what is to run before the page's own scripts.
    pub fn open(netns: &Netns, url: &str, prelude: &str) -> Self {
        let profile = tempfile::Builder::new().prefix("flannel-browser").tempdir().unwrap();
        let mut command = netns.command("sh");
        command.args(["-c", AS_PIPES, "sh", "chromium"]).args(FLAGS);
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        // What it keeps elsewhere goes with the profile.
        command.env("HOME", profile.path()).env("TMPDIR", profile.path());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (commands, said) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, answers) = channel();
        thread::spawn(move || {
            for message in BufReader::new(said).split(0).map_while(Result::ok) {
                let message = serde_json::from_slice(&message).unwrap_or(Value::Null);
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Self { child, commands, answers, last: 0, session: None, _profile: profile };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        browser.call("Page.enable", json!({}));
        browser.call("Page.addScriptToEvaluateOnNewDocument", json!({ "source": prelude }));
        browser.call("Page.navigate", json!({ "url": url }));
        browser
    }

    /// What a command results in.
    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.last += 1;
        let mut command = json!({ "id": self.last, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            command["sessionId"] = session.as_str().into();
        }
        self.commands.write_all(format!("{command}\0").as_bytes()).unwrap();
        loop {
            let mut message = self.answers.recv_timeout(2 * SOON).unwrap_or_else(|error| panic!("{method}: {error}"));
            // The others are events.
            if message["id"] == self.last {
                assert_eq!(message["error"], Value::Null, "{method}");
                return message["result"].take();
            }
        }
    }

    /// The value of an expression on the page.
    pub fn value(&mut self, expression: &str) -> Value {
        let parameters = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut result = self.call("Runtime.evaluate", parameters);
        assert_eq!(result["exceptionDetails"], Value::Null, "{expression}");
        result["result"]["value"].take()
    }

    /// The text of the first element that a selector finds; empty without one.
    pub fn text(&mut self, selector: &str) -> String {
        let text = self.value(&format!(
            "((found) => found?.innerText ?? found?.textContent ?? '')(document.querySelector({selector:?}))"
        ));
        text.as_str().unwrap().to_owned()
    }

    /// Whether an expression is true. While the page is loaded there may not be what it is about.
    pub fn holds(&mut self, expression: &str) -> bool {
        self.value(&format!("(() => {{ try {{ return {expression}; }} catch {{ return false; }} }})()")) == true
    }

    /// Waits until an expression is true.
    pub fn wait(&mut self, expression: &str) {
        let waited = wait_for(expression, 2 * SOON, || self.holds(expression));
        assert!(waited.is_ok(), "{expression}:\n{}", self.text("body"));
    }

    /// A picture of the whole page as it is at a width.
    pub fn picture(&mut self, path: &Path, width: u16, scheme: &str) {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
        let mut size = json!({ "width": width, "height": 600, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", size.clone());
        size["height"] = self.value("document.documentElement.scrollHeight");
        self.call("Emulation.setDeviceMetricsOverride", size);
        let picture = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        fs::write(path, BASE64.decode(picture["data"].as_str().unwrap()).unwrap()).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It ends its other processes where it is asked to; it does so by itself where nobody asks it anything any more.
        let _gone = self.commands.write_all(b"{\"id\": 0, \"method\": \"Browser.close\"}\0");
        let ended =
            wait_for("the browser's end", Duration::from_secs(5), || !matches!(self.child.try_wait(), Ok(None)));
        if ended.is_err() {
            let _gone = self.child.kill();
            let _reaped = self.child.wait();
        }
    }
}
