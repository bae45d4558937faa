//! An AVL tree of key intervals by start and end, each node knowing the greatest end below it (Cormen et al., interval trees).

use std::{cmp::Ordering, collections::BTreeSet};

use bytes::Bytes;

use crate::watch::WatchId;

/// End of an interval, not part of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Before(Bytes),
    Never,
}

impl End {
    fn new(end: Option<&Bytes>) -> Self {
        end.map_or(Self::Never, |end| Self::Before(end.clone()))
    }

    fn is_after(&self, key: &[u8]) -> bool {
        match self {
            Self::Before(end) => key < end.as_ref(),
            Self::Never => true,
        }
    }
}

#[derive(Debug)]
struct Node {
    start: Bytes,
    end: End,
    greatest_end: End,
    height: u8,
    ids: BTreeSet<WatchId>,
    left: Tree,
    right: Tree,
}

type Tree = Option<Box<Node>>;

#[derive(Debug, Default)]
pub(super) struct IntervalTree {
    root: Tree,
}

impl IntervalTree {
    pub(super) fn insert(&mut self, start: &Bytes, end: Option<&Bytes>, id: WatchId) {
        self.root = Some(insert(self.root.take(), start, End::new(end), id));
    }

    pub(super) fn remove(&mut self, start: &Bytes, end: Option<&Bytes>, id: WatchId) {
        self.root = remove(self.root.take(), start, &End::new(end), id);
    }

    /// Visits the watchers of every interval that holds `key`.
    pub(super) fn stab(&self, key: &[u8], visit: &mut impl FnMut(WatchId)) {
        stab(&self.root, key, visit);
    }

    #[cfg(test)]
    pub(super) fn check(&self) {
        check(&self.root);
    }
}

/// Depth is that of the tree: at most 1.44 log2 of the number of distinct ranges.
fn stab(tree: &Tree, key: &[u8], visit: &mut impl FnMut(WatchId)) {
    let Some(node) = tree else {
        return;
    };
    if !node.greatest_end.is_after(key) {
        return;
    }
    stab(&node.left, key, visit);
    if node.start.as_ref() <= key {
        if node.end.is_after(key) {
            node.ids.iter().copied().for_each(&mut *visit);
        }
        stab(&node.right, key, visit);
    }
}

fn order(start: &Bytes, end: &End, node: &Node) -> Ordering {
    start.cmp(&node.start).then_with(|| end.cmp(&node.end))
}

fn insert(tree: Tree, start: &Bytes, end: End, id: WatchId) -> Box<Node> {
    let Some(mut node) = tree else {
        return Box::new(Node {
            start: start.clone(),
            greatest_end: end.clone(),
            end,
            height: 1,
            ids: BTreeSet::from([id]),
            left: None,
            right: None,
        });
    };
    match order(start, &end, &node) {
        Ordering::Equal => {
            node.ids.insert(id);
            return node;
        }
        Ordering::Less => node.left = Some(insert(node.left.take(), start, end, id)),
        Ordering::Greater => node.right = Some(insert(node.right.take(), start, end, id)),
    }
    balance(node)
}

fn remove(tree: Tree, start: &Bytes, end: &End, id: WatchId) -> Tree {
    let mut node = tree?;
    match order(start, end, &node) {
        Ordering::Less => node.left = remove(node.left.take(), start, end, id),
        Ordering::Greater => node.right = remove(node.right.take(), start, end, id),
        Ordering::Equal => {
            node.ids.remove(&id);
            if !node.ids.is_empty() {
                return Some(node);
            }
            return join(node.left.take(), node.right.take());
        }
    }
    Some(balance(node))
}

/// Joins the two sides of a removed node.
fn join(left: Tree, right: Tree) -> Tree {
    let Some(right) = right else {
        return left;
    };
    let (mut first, rest) = take_first(right);
    first.left = left;
    first.right = rest;
    Some(balance(first))
}

fn take_first(mut node: Box<Node>) -> (Box<Node>, Tree) {
    match node.left.take() {
        None => {
            let rest = node.right.take();
            (node, rest)
        }
        Some(left) => {
            let (first, rest) = take_first(left);
            node.left = rest;
            (first, Some(balance(node)))
        }
    }
}

fn height(tree: &Tree) -> u8 {
    tree.as_ref().map_or(0, |node| node.height)
}

fn update(node: &mut Node) {
    node.height = 1 + height(&node.left).max(height(&node.right));
    node.greatest_end = [&node.left, &node.right]
        .into_iter()
        .flatten()
        .map(|child| &child.greatest_end)
        .chain([&node.end])
        .max()
        .unwrap_or(&node.end)
        .clone();
}

fn balance(mut node: Box<Node>) -> Box<Node> {
    if height(&node.left) > height(&node.right) + 1 {
        if let Some(left) = node.left.take() {
            let leans_right = height(&left.right) > height(&left.left);
            node.left = Some(if leans_right { rotate_left(left) } else { left });
        }
        return rotate_right(node);
    }
    if height(&node.right) > height(&node.left) + 1 {
        if let Some(right) = node.right.take() {
            let leans_left = height(&right.left) > height(&right.right);
            node.right = Some(if leans_left {
                rotate_right(right)
            } else {
                right
            });
        }
        return rotate_left(node);
    }
    update(&mut node);
    node
}

fn rotate_right(mut node: Box<Node>) -> Box<Node> {
    let Some(mut top) = node.left.take() else {
        update(&mut node);
        return node;
    };
    node.left = top.right.take();
    update(&mut node);
    top.right = Some(node);
    update(&mut top);
    top
}

fn rotate_left(mut node: Box<Node>) -> Box<Node> {
    let Some(mut top) = node.right.take() else {
        update(&mut node);
        return node;
    };
    node.right = top.left.take();
    update(&mut node);
    top.left = Some(node);
    update(&mut top);
    top
}

/// Asserts balance, order and the greatest ends; returns the height.
#[cfg(test)]
fn check(tree: &Tree) -> u8 {
    let Some(node) = tree else {
        return 0;
    };
    let (left, right) = (check(&node.left), check(&node.right));
    assert!(left.abs_diff(right) <= 1, "out of balance");
    assert_eq!(node.height, 1 + left.max(right));
    let mut greatest = node.end.clone();
    for child in [&node.left, &node.right].into_iter().flatten() {
        greatest = greatest.max(child.greatest_end.clone());
    }
    assert_eq!(node.greatest_end, greatest);
    if let Some(left) = &node.left {
        assert_eq!(order(&left.start, &left.end, node), Ordering::Less);
    }
    if let Some(right) = &node.right {
        assert_eq!(order(&right.start, &right.end, node), Ordering::Greater);
    }
    node.height
}
