//! The objects, their revisions, and what of the past is still known: what etcd and the watch cache are to an API server
//! (apiserver/pkg/storage/cacher).

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{File, OpenOptions},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use serde_json::{Map, Value, json, value::RawValue};
use tokio::sync::watch;

use super::resources::Resource;

/// How many changes watches can begin behind.
const HISTORY: usize = 4096;
/// How many lists that are read in chunks can be gone on with.
const SNAPSHOTS: usize = 64;

/// Where an object is: the resource's name in paths, the namespace, the name.
pub(super) type Key = (&'static str, String, String);

/// All objects at one revision.
pub(super) type Snapshot = Arc<BTreeMap<Key, Arc<Object>>>;

/// An object as of one revision.
#[derive(Debug)]
pub(super) struct Object {
    /// Where it is.
    pub(super) key: Key,
    /// The revision that made it this.
    pub(super) revision: u64,
    /// As JSON, which begins with its type.
    text: Bytes,
    /// How long that beginning is.
    typed: usize,
    partial: OnceLock<Bytes>,
}

impl Object {
    /// From its text, to which its type is added. The text is an object without a type, and
    /// its metadata come first.
    pub(super) fn new(resource: &Resource, key: Key, revision: u64, untyped: &str) -> Self {
        let head = format!("{{\"kind\":\"{}\",\"apiVersion\":\"{}\",", resource.kind, resource.api_version());
        let text = format!("{head}{}", untyped.trim_start_matches('{'));
        Self { key, revision, text: text.into(), typed: head.len(), partial: OnceLock::new() }
    }

    /// The whole of it, as JSON.
    pub(super) fn text(&self) -> Bytes {
        self.text.clone()
    }

    /// The whole of it without the type, and without the first brace: as an element of a list, where the type is the list's.
    pub(super) fn untyped(&self) -> &[u8] {
        &self.text[self.typed..]
    }

    /// Its metadata, as JSON. What comes behind it is not read: of thousands of nodes that takes seconds.
    pub(super) fn partial(&self) -> Bytes {
        let make = || {
            let metadata = self.untyped().strip_prefix(b"\"metadata\":").unwrap_or_default();
            let mut values = serde_json::Deserializer::from_slice(metadata).into_iter::<&RawValue>();
            let metadata = values.next().and_then(Result::ok).map_or("{}", RawValue::get);
            let head = "{\"kind\":\"PartialObjectMetadata\",\"apiVersion\":\"meta.k8s.io/v1\",\"metadata\":";
            format!("{head}{metadata}}}").into()
        };
        self.partial.get_or_init(make).clone()
    }

    /// The whole of it.
    pub(super) fn value(&self) -> Value {
        serde_json::from_slice(&self.text).unwrap_or_default()
    }
}

/// What happened to an object.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// The type of the event.
    pub(super) event: &'static str,
    /// What the object became; of a deleted one, what it last was, with the revision of the deletion.
    pub(super) object: Arc<Object>,
}

/// All objects.
#[derive(Debug)]
pub(super) struct Objects {
    inner: Mutex<Inner>,
    /// The newest revision.
    pub(super) revision: watch::Sender<u64>,
}

#[derive(Debug)]
struct Inner {
    revision: u64,
    objects: Snapshot,
    history: VecDeque<Change>,
    /// The oldest revision that all changes since are known of.
    oldest: u64,
    snapshots: VecDeque<(u64, Snapshot)>,
    journal: File,
}

impl Objects {
    /// Reads what a server before wrote into the folder. As after a start of the real one, which writes objects of its own
    /// first, the past is known from a revision on that is newer than any that clients know: whoever watched has to list
    /// again.
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let path = directory.join("journal");
        let mut objects = BTreeMap::new();
        let mut revision = 0;
        let mut complete = 0;
        if path.exists() {
            let mut file = BufReader::new(File::open(&path).with_context(|| format!("open {path:?}"))?);
            let mut line = Vec::new();
            // A line without its end is what a server wrote that was killed.
            while file.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
                complete += line.len() as u64;
                replay(&line, &mut objects, &mut revision).with_context(|| format!("read {path:?}"))?;
                line.clear();
            }
        }
        revision += 1;
        let journal = OpenOptions::new().create(true).append(true).open(&path);
        let journal = journal.with_context(|| format!("open {path:?}"))?;
        journal.set_len(complete)?;
        let inner = Inner {
            revision,
            objects: Arc::new(objects),
            history: VecDeque::new(),
            oldest: revision,
            snapshots: VecDeque::new(),
            journal,
        };
        Ok(Self { inner: Mutex::new(inner), revision: watch::Sender::new(revision) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A half-made change is none: all that is assigned is assigned last.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One object.
    pub(super) fn get(&self, key: &Key) -> Option<Arc<Object>> {
        self.lock().objects.get(key).cloned()
    }

    /// All objects, and the newest revision.
    pub(super) fn now(&self) -> (u64, Snapshot) {
        let inner = self.lock();
        (inner.revision, inner.objects.clone())
    }

    /// The same, to be found again by that revision.
    pub(super) fn keep_now(&self) -> (u64, Snapshot) {
        let mut inner = self.lock();
        let now = (inner.revision, inner.objects.clone());
        if inner.snapshots.back().is_none_or(|(revision, _)| *revision != now.0) {
            inner.snapshots.push_back(now.clone());
        }
        if inner.snapshots.len() > SNAPSHOTS {
            inner.snapshots.pop_front();
        }
        now
    }

    /// All objects as of a revision, if that is still known.
    pub(super) fn at(&self, revision: u64) -> Option<Snapshot> {
        let inner = self.lock();
        if inner.revision == revision {
            return Some(inner.objects.clone());
        }
        inner.snapshots.iter().find(|(kept, _)| *kept == revision).map(|(_, objects)| objects.clone())
    }

    /// What changed since a revision, and the newest one; or the oldest that this is known of.
    pub(super) fn since(&self, revision: u64) -> Result<(Vec<Change>, u64), u64> {
        let inner = self.lock();
        if revision < inner.oldest {
            return Err(inner.oldest);
        }
        let first = inner.history.partition_point(|change| change.object.revision <= revision);
        Ok((inner.history.range(first..).cloned().collect(), inner.revision))
    }

    /// Forgets the past, as by a compaction.
    pub(super) fn forget(&self) {
        let mut inner = self.lock();
        inner.history.clear();
        inner.snapshots.clear();
        inner.oldest = inner.revision;
    }

    /// Changes one object, or makes it, or removes it: `change` says what becomes of it. Nothing is written where that is
    /// what it was.
    pub(super) fn change<E: From<anyhow::Error>>(
        &self,
        resource: &Resource,
        key: &Key,
        change: impl FnOnce(Option<&Arc<Object>>) -> Result<Option<Value>, E>,
    ) -> Result<Option<Arc<Object>>, E> {
        let mut inner = self.lock();
        let known = inner.objects.get(key).cloned();
        let becomes = change(known.as_ref())?;
        let revision = inner.revision + 1;
        let (event, object) = match (known, becomes) {
            (None, None) => return Ok(None),
            (Some(known), None) => ("DELETED", object(resource, key.clone(), revision, known.value())),
            (Some(known), Some(value)) if is_same(&known, &value) => return Ok(Some(known)),
            (Some(_), Some(value)) => ("MODIFIED", object(resource, key.clone(), revision, value)),
            (None, Some(value)) => ("ADDED", object(resource, key.clone(), revision, value)),
        };
        inner.apply(event, &object)?;
        drop(inner);
        self.revision.send_replace(revision);
        Ok(Some(object))
    }

    /// Puts many at once by their texts, which have no type, and `{revision}` in the place of the resource version.
    pub(super) fn fill(&self, resource: &Resource, texts: impl Iterator<Item = (Key, String)>) -> Result<()> {
        let mut inner = self.lock();
        for (key, text) in texts {
            let revision = inner.revision + 1;
            let text = text.replace("{revision}", &revision.to_string());
            let event = if inner.objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
            inner.apply(event, &Arc::new(Object::new(resource, key, revision, &text)))?;
        }
        let revision = inner.revision;
        drop(inner);
        self.revision.send_replace(revision);
        Ok(())
    }
}

impl Inner {
    fn apply(&mut self, event: &'static str, object: &Arc<Object>) -> Result<()> {
        let key = object.key.clone();
        let is_deleted = event == "DELETED";
        let text = if is_deleted { "null".into() } else { String::from_utf8_lossy(&object.text) };
        // In one call: killed before or after it, but not within.
        let line = format!("{} {} {} {} {text}\n", object.revision, key.0, or_dash(&key.1), key.2);
        self.journal.write_all(line.as_bytes()).context("write the journal")?;
        let objects = Arc::make_mut(&mut self.objects);
        if is_deleted {
            objects.remove(&key);
        } else {
            objects.insert(key, object.clone());
        }
        self.revision = object.revision;
        self.history.push_back(Change { event, object: object.clone() });
        if self.history.len() > HISTORY
            && let Some(first) = self.history.pop_front()
        {
            self.oldest = first.object.revision;
        }
        Ok(())
    }
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

fn replay(line: &[u8], objects: &mut BTreeMap<Key, Arc<Object>>, newest: &mut u64) -> Result<()> {
    let line = std::str::from_utf8(line)?;
    let mut parts = line.trim_end().splitn(5, ' ');
    let mut next = || parts.next().context("a line is too short");
    let (revision, plural, namespace, name, text) = (next()?, next()?, next()?, next()?, next()?);
    let resource = Resource::by_plural(plural).with_context(|| format!("no resource {plural}"))?;
    let namespace = if namespace == "-" { "" } else { namespace };
    let key = (resource.plural, namespace.to_owned(), name.to_owned());
    *newest = revision.parse()?;
    if text == "null" {
        objects.remove(&key);
    } else {
        let head = format!("{{\"kind\":\"{}\",\"apiVersion\":\"{}\",", resource.kind, resource.api_version());
        let untyped = text.strip_prefix(&head).context("an object without its type")?;
        objects.insert(key.clone(), Arc::new(Object::new(resource, key, *newest, untyped)));
    }
    Ok(())
}

/// A value as of a revision: the type first, then the metadata.
fn object(resource: &Resource, key: Key, revision: u64, mut value: Value) -> Arc<Object> {
    let mut ordered = Map::new();
    let mut metadata = value["metadata"].take();
    metadata["resourceVersion"] = json!(revision.to_string());
    ordered.insert("metadata".to_owned(), metadata);
    if let Value::Object(fields) = value {
        for (name, field) in fields {
            if !matches!(name.as_str(), "kind" | "apiVersion" | "metadata") {
                ordered.insert(name, field);
            }
        }
    }
    Arc::new(Object::new(resource, key, revision, &Value::Object(ordered).to_string()))
}

fn is_same(known: &Object, value: &Value) -> bool {
    let without_revision = |mut value: Value| {
        if let Some(metadata) = value["metadata"].as_object_mut() {
            metadata.shift_remove("resourceVersion");
        }
        value
    };
    let mut known = known.value();
    // Where a client left it out.
    for field in ["kind", "apiVersion"] {
        known[field] = value[field].clone();
    }
    let mut value = value.clone();
    for field in ["kind", "apiVersion"] {
        value[field] = known[field].clone();
    }
    without_revision(known) == without_revision(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(objects: &Objects, name: &str, value: Option<Value>) -> u64 {
        let node = Resource::by_plural("nodes").unwrap();
        let key = (node.plural, String::new(), name.to_owned());
        objects.change::<anyhow::Error>(node, &key, |_| Ok(value)).unwrap().map_or(0, |object| object.revision)
    }

    #[test]
    fn a_journal_that_breaks_off_is_gone_on_with() {
        let directory = tempfile::tempdir().unwrap();
        let objects = Objects::open(directory.path()).unwrap();
        assert_eq!(put(&objects, "a", Some(json!({"metadata": {"name": "a"}}))), 2);
        assert_eq!(put(&objects, "a", Some(json!({"metadata": {"name": "a"}}))), 2);
        assert_eq!(put(&objects, "b", Some(json!({"metadata": {"name": "b"}, "x": "é"}))), 3);
        assert_eq!(put(&objects, "a", None), 4);
        assert_eq!(objects.since(2).unwrap().0.len(), 2);
        drop(objects);
        let journal = directory.path().join("journal");
        OpenOptions::new().append(true).open(journal).unwrap().write_all(b"5 nodes - c {\"ki").unwrap();

        let objects = Objects::open(directory.path()).unwrap();
        let (revision, all) = objects.now();
        assert_eq!((revision, all.len()), (5, 1));
        assert_eq!(all.values().next().unwrap().value()["x"], "é");
        assert_eq!(objects.since(4).unwrap_err(), 5);
        assert_eq!(put(&objects, "c", Some(json!({}))), 6);
        drop(objects);
        assert_eq!(Objects::open(directory.path()).unwrap().now().1.len(), 2);
    }

    #[test]
    fn a_snapshot_stays_until_it_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let objects = Objects::open(directory.path()).unwrap();
        put(&objects, "a", Some(json!({})));
        let (revision, _) = objects.keep_now();
        put(&objects, "b", Some(json!({})));
        assert_eq!(objects.at(revision).unwrap().len(), 1);
        assert_eq!(objects.since(revision).unwrap().0.len(), 1);
        objects.forget();
        assert!(objects.at(revision).is_none());
        assert_eq!(objects.since(revision).unwrap_err(), 3);
    }
}
