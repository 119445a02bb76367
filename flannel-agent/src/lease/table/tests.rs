//! The table and its guard, by cases and by properties.

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::lease::MacAddress;

const GRACE: Duration = Duration::from_secs(900);

fn subnet(n: u8) -> Ipv4Net {
    Ipv4Net::new_assert([10, 5, n, 0].into(), 24)
}

fn peer(n: u8) -> Peer {
    Peer { public_ip: [192, 168, 0, n].into(), vtep_mac: MacAddress([2, 0, 0, 0, 0, n]) }
}

fn peers(numbers: impl IntoIterator<Item = u8>) -> BTreeMap<Ipv4Net, Peer> {
    numbers.into_iter().map(|n| (subnet(n), peer(n))).collect()
}

fn key(n: u8) -> LeaseKey {
    subnet(n).into()
}

fn snapshot(numbers: impl IntoIterator<Item = u8>) -> BTreeMap<LeaseKey, Peer> {
    numbers.into_iter().map(|n| (key(n), peer(n))).collect()
}

fn table(numbers: impl IntoIterator<Item = u8>) -> LeaseTable {
    LeaseTable::new(peers(numbers), GRACE)
}

fn nobody(_: Ipv4Net) -> bool {
    false
}

fn everybody(_: Ipv4Net) -> bool {
    true
}

fn reasons(table: &LeaseTable) -> Vec<(Ipv4Net, HoldReason)> {
    table.held().map(|(subnet, hold)| (*subnet, hold.reason)).collect()
}

#[test]
fn the_documentation_has_a_row_for_each_reason() {
    let documentation = include_str!("../../../docs/leases.md");
    for reason in HoldReason::ALL {
        let row = format!("| `{}` | {} |", reason.label(), reason.description());
        assert!(documentation.contains(&row), "docs/leases.md lacks: {row}");
    }
}

/// Judges what is to be judged, some time later.
fn settled(table: &mut LeaseTable, is_heard: impl Fn(Ipv4Net) -> bool) -> Vec<PeerChange> {
    let settles_at = table.settles_at().expect("something is to be judged");
    assert_eq!(table.settle(nobody, settles_at - Duration::from_millis(1)), [], "not before that");
    table.settle(is_heard, settles_at)
}

/// Deletions, each in a revision of its own.
fn remove(table: &mut LeaseTable, numbers: impl IntoIterator<Item = u8>, now: Instant) {
    for (revision, n) in numbers.into_iter().enumerate() {
        assert_eq!(table.remove(key(n), Some(revision as i64 + 1), now), None);
    }
}

#[test]
fn a_changed_host_is_a_change_though_its_subnet_stays() {
    let mut table = table(1..=3);
    let mut snapshot = snapshot(1..=3);
    snapshot.insert(key(2), peer(9));
    let changes = table.replace(snapshot.clone(), Credibility::Whole, Instant::now());
    assert_eq!(changes, [PeerChange::Set(subnet(2), peer(9))]);
    assert_eq!(table.replace(snapshot, Credibility::Whole, Instant::now()), []);
    assert_eq!(table.set(key(2), peer(9)), None);
    assert_eq!(table.settles_at(), None);
}

#[test]
fn a_few_removals_are_believed_and_many_are_not() {
    let now = Instant::now();
    let mut few = table(0..10);
    assert_eq!(few.replace(snapshot(3..10), Credibility::Whole, now), []);
    assert_eq!(settled(&mut few, nobody).len(), 3);
    // The fourth within the window.
    remove(&mut few, [9], now);
    assert_eq!(settled(&mut few, nobody), []);
    assert_eq!(reasons(&few), [(subnet(9), HoldReason::MassRemoval)]);
    let later = now + 2 * WINDOW;
    remove(&mut few, [8], later);
    assert_eq!(settled(&mut few, nobody), [PeerChange::Remove(subnet(8))]);

    let mut many = table(0..10);
    assert_eq!(many.replace(snapshot(4..10), Credibility::Whole, now), []);
    assert_eq!(settled(&mut many, nobody), []);
    assert_eq!((many.len(), many.held().len()), (10, 4));
    // One in twenty is believed in a large cluster.
    let mut large = table(0..200);
    large.replace(snapshot(10..200), Credibility::Whole, now);
    assert_eq!(settled(&mut large, nobody).len(), 10);
}

#[test]
fn a_single_deletion_is_believed() {
    let now = Instant::now();
    for peers in 1..=5 {
        let mut table = table(0..peers);
        remove(&mut table, [0], now);
        assert_eq!(settled(&mut table, nobody), [PeerChange::Remove(subnet(0))], "of {peers}");
    }
}

#[test]
fn a_range_is_held_whatever_its_size() {
    let now = Instant::now();
    let mut table = table(0..100);
    assert_eq!(table.remove(key(7), Some(5), now), None);
    assert_eq!(table.remove(key(8), Some(5), now), None);
    assert_eq!(settled(&mut table, nobody), []);
    assert_eq!(table.held().len(), 2);
}

#[test]
fn what_goes_one_after_the_other_within_seconds_is_judged_together() {
    let now = Instant::now();
    let mut table = table(0..4);
    for n in 0..3 {
        let later = now + Duration::from_secs(n.into());
        assert_eq!(table.settle(nobody, later), []);
        remove(&mut table, [n], later);
    }
    assert_eq!(settled(&mut table, nobody), []);
    assert_eq!(table.held().len(), 3);
    // And what follows.
    remove(&mut table, [3], now + Duration::from_secs(20));
    assert_eq!(settled(&mut table, nobody), []);
    assert_eq!(table.held().len(), 4);
}

#[test]
fn the_own_lease_alone_is_told_from_the_own_lease_with_others() {
    let now = Instant::now();
    let judged = |deletions: &[(Option<u8>, i64)]| {
        let mut table = table(0..20);
        for (n, revision) in deletions {
            match n {
                Some(n) => drop(table.remove(key(*n), Some(*revision), now)),
                None => table.own_is_gone(Some(*revision), now),
            }
        }
        assert_eq!(table.own_deletion(), None);
        settled(&mut table, nobody);
        (table.own_deletion(), table.held().len())
    };
    assert_eq!(judged(&[(None, 5)]), (Some(OwnDeletion::Alone), 0));
    assert_eq!(judged(&[(None, 5), (Some(1), 5)]), (Some(OwnDeletion::WithOthers), 1));
    assert_eq!(judged(&[(Some(1), 4), (None, 5)]), (Some(OwnDeletion::WithOthers), 1));
    assert_eq!(judged(&[(Some(1), 4), (Some(2), 5)]), (None, 0));
}

#[test]
fn who_is_back_already_was_deleted_all_the_same() {
    let now = Instant::now();
    let mut table = table(0..2);
    table.own_is_gone(Some(6), now);
    remove(&mut table, [0, 1], now);
    assert_eq!(table.set(key(0), peer(0)), None);
    assert_eq!(table.set(key(1), peer(1)), None);
    assert_eq!(settled(&mut table, nobody), []);
    assert_eq!(table.own_deletion(), Some(OwnDeletion::WithOthers));
    table.own_is_there();
    assert_eq!(table.own_deletion(), None);
}

#[test]
fn an_answer_without_our_own_lease_removes_nobody() {
    let now = Instant::now();
    let mut table = table(1..=2);
    assert_eq!(table.replace(snapshot([2]), Credibility::Doubtful, now), []);
    assert_eq!(settled(&mut table, nobody), []);
    assert_eq!(table.held().len(), 1);
    assert_eq!(table.own_deletion(), Some(OwnDeletion::WithOthers));
}

#[test]
fn an_answer_that_lacks_nothing_else_says_that_our_own_lease_was_deleted() {
    let mut table = table(1..=2);
    assert_eq!(table.replace(snapshot(1..=2), Credibility::Doubtful, Instant::now()), []);
    assert_eq!(settled(&mut table, nobody), []);
    assert_eq!(table.own_deletion(), Some(OwnDeletion::Alone));
    assert_eq!(table.replace(snapshot(1..=2), Credibility::Whole, Instant::now()), []);
    assert_eq!(table.own_deletion(), None);
}

#[test]
fn who_still_sends_stays_until_silent() {
    let now = Instant::now();
    let mut table = table(1..=2);
    remove(&mut table, [1], now);
    assert_eq!(settled(&mut table, everybody), []);
    assert_eq!(reasons(&table), [(subnet(1), HoldReason::StillSends)]);
    assert_eq!(table.review(everybody, now + 10 * GRACE), []);
    assert_eq!(table.review(nobody, now), [PeerChange::Remove(subnet(1))]);
}

#[test]
fn the_grace_ends_for_the_silent_only() {
    let now = Instant::now();
    let mut table = table(0..10);
    table.replace(snapshot([]), Credibility::Whole, now);
    settled(&mut table, nobody);
    assert_eq!(table.review(nobody, now + GRACE / 2), []);
    let changes = table.review(|heard| heard == subnet(7), now + 2 * GRACE);
    assert_eq!(changes.len(), 9);
    assert_eq!(reasons(&table), [(subnet(7), HoldReason::StillSends)]);
    assert_eq!(table.release(now), [PeerChange::Remove(subnet(7))]);
    assert!(table.is_empty());
    table.set(key(1), peer(1));
    remove(&mut table, [1], now);
    assert_eq!(settled(&mut table, nobody), [PeerChange::Remove(subnet(1))]);
}

#[test]
fn an_operator_need_not_wait_until_it_is_judged() {
    let now = Instant::now();
    let mut table = table(0..4);
    remove(&mut table, 0..4, now);
    assert_eq!(table.unnamed().len(), 4);
    assert_eq!(table.release(now).len(), 4);
    assert_eq!(settled(&mut table, everybody), []);
    assert!(table.is_empty());
}

#[test]
fn what_comes_back_is_held_no_more() {
    let now = Instant::now();
    let mut table = table(0..10);
    table.replace(snapshot([]), Credibility::Doubtful, now);
    settled(&mut table, nobody);
    assert_eq!(table.held().len(), 10);
    assert_eq!(table.set(key(1), peer(1)), None);
    assert_eq!(table.replace(snapshot(0..10), Credibility::Whole, now), []);
    assert_eq!(table.held().len(), 0);
}

#[test]
fn a_host_that_took_another_subnet_leaves_its_old_one_at_once() {
    let now = Instant::now();
    let mut moving = table(1..=2);
    let moved = BTreeMap::from([(key(1), peer(1)), (key(3), peer(2))]);
    let changes = moving.replace(moved, Credibility::Whole, now);
    assert_eq!(changes, [PeerChange::Set(subnet(3), peer(2)), PeerChange::Remove(subnet(2))]);
    moving.set(key(4), peer(1));
    assert_eq!(moving.remove(key(1), Some(1), now), Some(PeerChange::Remove(subnet(1))));

    // Also where it comes back only after all were deleted.
    let mut held = table(1..=2);
    held.replace(snapshot([]), Credibility::Doubtful, now);
    settled(&mut held, nobody);
    held.set(key(3), peer(2));
    assert_eq!(held.review(everybody, now), [PeerChange::Remove(subnet(2))]);
    assert_eq!(reasons(&held), [(subnet(1), HoldReason::MassRemoval)]);
}

#[test]
fn a_siblings_end_is_not_a_peers() {
    let now = Instant::now();
    let mut table = table([]);
    let dual = LeaseKey { ipv6_subnet: "fd00::/64".parse().ok(), ..key(1) };
    assert_eq!(table.set(key(1), peer(1)), Some(PeerChange::Set(subnet(1), peer(1))));
    assert_eq!(table.set(dual, peer(2)), Some(PeerChange::Set(subnet(1), peer(2))));
    assert_eq!(table.set(key(1), peer(3)), None);
    assert_eq!(table.remove(dual, Some(1), now), Some(PeerChange::Set(subnet(1), peer(3))));
    table.set(dual, peer(2));
    assert_eq!(table.remove(key(1), Some(2), now), None);
    assert_eq!(table.settles_at(), None);
    assert_eq!(table.remove(dual, Some(3), now), None);
    assert_eq!(settled(&mut table, nobody), [PeerChange::Remove(subnet(1))]);
}

prop_compose! {
    fn any_key()(n in 0u8..12, is_dual: bool) -> LeaseKey {
        LeaseKey { ipv6_subnet: is_dual.then(|| "fd00::/64".parse().expect("CIDR")), ..key(n) }
    }
}

fn apply(peers: &mut BTreeMap<Ipv4Net, Peer>, change: PeerChange) {
    match change {
        PeerChange::Set(subnet, peer) => drop(peers.insert(subnet, peer)),
        PeerChange::Remove(subnet) => drop(peers.remove(&subnet)),
    }
}

proptest! {
    /// Events and the last snapshot lead to the same set, once nothing is held any more; and the changes reported on
    /// the way say exactly that.
    #[test]
    fn events_end_where_the_snapshot_does(
        events in vec((any_key(), proptest::option::of(0u8..4), 0u64..4, any::<bool>(), 0u64..5), 0..60),
        start in vec((any_key(), 0u8..4), 0..12),
    ) {
        let mut now = Instant::now();
        let first: BTreeMap<_, _> = start.into_iter().map(|(key, p)| (key, peer(p))).collect();
        let mut last = first.clone();
        let mut by_event = table([]);
        let mut reported = BTreeMap::new();
        for change in by_event.replace(first.clone(), Credibility::Whole, now) {
            apply(&mut reported, change);
        }
        let mut revision = 1;
        for (key, p, later, is_heard, newer) in events {
            now += Duration::from_secs(later);
            revision += i64::from(newer > 0);
            let change = match p {
                Some(p) => { last.insert(key, peer(p)); by_event.set(key, peer(p)) }
                None => { last.remove(&key); by_event.remove(key, Some(revision), now) }
            };
            let settled = by_event.settle(|_| is_heard, now);
            change.into_iter().chain(settled).for_each(|change| apply(&mut reported, change));
            // Nothing that the store names is ever missing.
            prop_assert!(last.keys().all(|key| by_event.peers.contains_key(&key.subnet)));
            prop_assert_eq!(&reported, &by_event.peers);
        }
        by_event.release(now).into_iter().for_each(|change| apply(&mut reported, change));
        let wanted: BTreeMap<_, _> = last.iter().map(|(key, peer)| (key.subnet, *peer)).collect();
        prop_assert_eq!(&by_event.peers, &wanted);
        prop_assert_eq!(&reported, &wanted);

        let mut by_snapshot = table([]);
        let mut reported = BTreeMap::new();
        for snapshot in [first, last] {
            let changes = by_snapshot.replace(snapshot, Credibility::Whole, now);
            changes.into_iter().for_each(|change| apply(&mut reported, change));
            let changes = by_snapshot.settle(everybody, now + WINDOW);
            changes.into_iter().for_each(|change| apply(&mut reported, change));
        }
        by_snapshot.release(now).into_iter().for_each(|change| apply(&mut reported, change));
        prop_assert_eq!(&by_snapshot.peers, &wanted);
        prop_assert_eq!(&reported, &wanted);
    }

    /// However all leases are deleted within seconds, told by events or by a snapshot half-way: nobody goes before
    /// the grace is over, this host does not take it for its own, and then the silent go.
    #[test]
    fn a_mass_removal_removes_nobody_within_the_grace(
        peers in 1u8..40,
        own_at: prop::sample::Index,
        steps in vec((0u64..1900, any::<bool>()), 41),
        snapshot_at in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut now = Instant::now();
        let mut table = table([]);
        table.replace(snapshot(0..peers), Credibility::Whole, now);
        let own_at = own_at.index(usize::from(peers) + 1);
        let snapshot_at = snapshot_at.map(|at| at.index(usize::from(peers) + 1));
        let mut deletions: Vec<_> = (0..peers).map(Some).collect();
        deletions.insert(own_at, None);
        // Most of them within ten seconds, else they are no mass.
        let mut left = Duration::from_millis(1900);
        let mut revision = 1;
        for (index, (n, (pause, is_newer))) in deletions.into_iter().zip(steps).enumerate() {
            let pause = Duration::from_millis(pause).min(left);
            left -= pause;
            now += pause;
            revision += i64::from(is_newer);
            prop_assert_eq!(table.settle(nobody, now), []);
            if snapshot_at == Some(index) {
                prop_assert_eq!(table.replace(snapshot([]), Credibility::Doubtful, now), []);
                break;
            }
            match n {
                Some(n) => prop_assert_eq!(table.remove(key(n), Some(revision), now), None),
                None => table.own_is_gone(Some(revision), now),
            }
        }
        prop_assert_eq!(settled(&mut table, nobody), []);
        prop_assert_eq!(table.own_deletion(), Some(OwnDeletion::WithOthers));
        prop_assert_eq!(table.review(nobody, now + GRACE / 2), []);
        prop_assert_eq!((table.len(), table.held().len()), (peers.into(), peers.into()));
        prop_assert_eq!(table.review(nobody, now + 2 * GRACE).len(), usize::from(peers));
        prop_assert!(table.is_empty());
    }
}

#[test]
fn what_an_older_table_lacks_is_held_however_few_it_is() {
    let now = Instant::now();
    let mut table = table(0..10);
    assert_eq!(table.replace(snapshot(1..10), Credibility::Older, now), []);
    assert_eq!(settled(&mut table, nobody), []);
    assert_eq!(reasons(&table), [(subnet(0), HoldReason::MassRemoval)]);
    // Afterwards a deletion is one again.
    remove(&mut table, [5], now + 2 * WINDOW);
    assert_eq!(settled(&mut table, nobody), [PeerChange::Remove(subnet(5))]);
}

#[test]
fn who_says_that_it_is_no_peer_goes_at_once_and_uses_up_nothing() {
    let now = Instant::now();
    let mut table = table(1..=20);
    let none = table.replace(snapshot(1..=20), Credibility::Whole, now);
    assert_eq!(none, []);
    for n in 1..=17 {
        assert_eq!(table.renounce(key(n)), Some(PeerChange::Remove(subnet(n))));
        assert_eq!(table.renounce(key(n)), None);
    }
    assert_eq!((table.len(), table.settles_at()), (3, None), "nothing is to be judged");
    // So many more may go as in any cluster.
    assert_eq!(table.remove(key(18), Some(7), now), None);
    assert_eq!(settled(&mut table, nobody), [PeerChange::Remove(subnet(18))]);
    assert!(reasons(&table).is_empty());
    // A subnet with two keys is the other's.
    let dual = LeaseKey { ipv6_subnet: Some("fd00:1::/64".parse().expect("prefix")), ..key(19) };
    assert_eq!(table.set(dual, peer(30)), Some(PeerChange::Set(subnet(19), peer(30))));
    assert_eq!(table.renounce(dual), Some(PeerChange::Set(subnet(19), peer(19))));
}
