//! A table of flows: found by what the guest's packets say, and by a number that epoll hands back.

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
    value: Option<V>,
}

/// Flows by key and by [`Id`].
pub struct Table<K, V> {
    keys: FxHashMap<K, Id>,
    slots: Vec<Slot<V>>,
    free: Vec<u32>,
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self { keys: FxHashMap::default(), slots: Vec::new(), free: Vec::new() }
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
            None => self.slots.push(Slot { generation: 0, value: Some(value) }),
        }
        self.keys.insert(key, id);
        id
    }

    pub fn find(&self, key: &K) -> Option<Id> {
        self.keys.get(key).copied()
    }

    pub fn get_mut(&mut self, id: Id) -> Option<&mut V> {
        let slot = self.slots.get_mut(id.index as usize)?;
        if slot.generation == id.generation { slot.value.as_mut() } else { None }
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        let id = self.keys.remove(key)?;
        let slot = &mut self.slots[id.index as usize];
        slot.generation = (slot.generation + 1) & GENERATIONS;
        self.free.push(id.index);
        slot.value.take()
    }

    pub fn iter(&self) -> impl Iterator<Item = &V> {
        self.slots.iter().filter_map(|slot| slot.value.as_ref())
    }
}
