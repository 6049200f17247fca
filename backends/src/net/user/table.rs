//! A table of flows: found by what the guest's packets say, and by a number that epoll hands back. Those that have
//! something to do stand in a queue.

use std::collections::VecDeque;
use std::hash::Hash;

use rustc_hash::FxHashMap;

/// Names a flow, and no other that takes its place later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id {
    pub index: u32,
    pub generation: u32,
}

/// What fits beside an index and a class in the 64 bits that epoll hands back.
pub const GENERATIONS: u32 = (1 << 29) - 1;

struct Slot<V> {
    generation: u32,
    queued: bool,
    value: Option<V>,
}

impl<V> Slot<V> {
    /// Takes the flow out; its name is no one's any more.
    fn take(&mut self) -> Option<V> {
        self.generation = (self.generation + 1) & GENERATIONS;
        self.queued = false;
        self.value.take()
    }
}

/// Flows by key and by [`Id`].
pub struct Table<K, V> {
    keys: FxHashMap<K, Id>,
    slots: Vec<Slot<V>>,
    free: Vec<u32>,
    queue: VecDeque<Id>,
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self { keys: FxHashMap::default(), slots: Vec::new(), free: Vec::new(), queue: VecDeque::new() }
    }
}

impl<K: Hash + Eq, V> Table<K, V> {
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// The name that the next flow will have.
    pub fn next_id(&self) -> Id {
        match self.free.last() {
            Some(&index) => Id { index, generation: self.slots[index as usize].generation },
            None => Id { index: self.slots.len() as u32, generation: 0 },
        }
    }

    /// Adds a flow under a key that is free.
    pub fn insert(&mut self, key: K, value: V) -> Id {
        let id = self.next_id();
        match self.free.pop() {
            Some(index) => self.slots[index as usize].value = Some(value),
            None => self.slots.push(Slot { generation: 0, queued: false, value: Some(value) }),
        }
        self.keys.insert(key, id);
        id
    }

    pub fn find(&self, key: &K) -> Option<Id> {
        self.keys.get(key).copied()
    }

    fn slot(&mut self, id: Id) -> Option<&mut Slot<V>> {
        self.slots.get_mut(id.index as usize).filter(|slot| slot.generation == id.generation)
    }

    pub fn get_mut(&mut self, id: Id) -> Option<&mut V> {
        self.slot(id)?.value.as_mut()
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        let id = self.keys.remove(key)?;
        self.free.push(id.index);
        self.slots[id.index as usize].take()
    }

    /// Takes all flows out.
    pub fn drain(&mut self) -> impl Iterator<Item = V> {
        self.queue.clear();
        self.free.extend(self.keys.drain().map(|(_, id)| id.index));
        self.slots.iter_mut().filter(|slot| slot.value.is_some()).filter_map(Slot::take)
    }

    /// Puts a flow into the queue, unless it stands there.
    pub fn enqueue(&mut self, id: Id) {
        if let Some(slot) = self.slot(id)
            && !slot.queued
        {
            slot.queued = true;
            self.queue.push_back(id);
        }
    }

    /// Some flow has something to do.
    pub fn is_busy(&self) -> bool {
        !self.queue.is_empty()
    }

    /// The next of the queue. The flow may be gone.
    pub fn next_queued(&mut self) -> Option<Id> {
        let id = self.queue.pop_front()?;
        if let Some(slot) = self.slot(id) {
            slot.queued = false;
        }
        Some(id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &V> {
        self.slots.iter().filter_map(|slot| slot.value.as_ref())
    }
}
