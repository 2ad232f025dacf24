//! Lists inside requests and answers, borrowed from wherever they lie: a body, a slice, or names the core keeps.

use std::fmt;

use flatbuffers::{ForwardsUOffset, Vector};

use crate::generated::wire::ringline::wire as fb;
use crate::ids::{ConversationId, Seq, UserName};

/// Names as they came: not checked. Cheap to copy; equal when their elements are.
#[derive(Clone, Copy, Default)]
pub struct Names<'a>(Source<'a>);

#[derive(Clone, Copy, Default)]
enum Source<'a> {
    #[default]
    None,
    Slice(&'a [&'a str]),
    Users(&'a [UserName]),
    Flat(Vector<'a, ForwardsUOffset<&'a str>>),
}

impl<'a> Names<'a> {
    pub(crate) fn flat(names: Option<Vector<'a, ForwardsUOffset<&'a str>>>) -> Self {
        Self(names.map_or(Source::None, Source::Flat))
    }

    pub fn len(&self) -> usize {
        match self.0 {
            Source::None => 0,
            Source::Slice(names) => names.len(),
            Source::Users(names) => names.len(),
            Source::Flat(names) => names.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `None` behind the last.
    pub fn get(&self, at: usize) -> Option<&'a str> {
        match self.0 {
            Source::None => None,
            Source::Slice(names) => names.get(at).copied(),
            Source::Users(names) => names.get(at).map(UserName::as_str),
            Source::Flat(names) => (at < names.len()).then(|| names.get(at)),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let names = *self;
        (0..names.len()).filter_map(move |at| names.get(at))
    }
}

impl<'a> From<&'a [&'a str]> for Names<'a> {
    fn from(names: &'a [&'a str]) -> Self {
        Self(Source::Slice(names))
    }
}

impl<'a> From<&'a [UserName]> for Names<'a> {
    fn from(names: &'a [UserName]) -> Self {
        Self(Source::Users(names))
    }
}

impl PartialEq for Names<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Names<'_> {}

impl fmt::Debug for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// A place in a conversation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub conversation: ConversationId,
    pub seq: Seq,
}

/// The places of a SYNC, as they came.
#[derive(Clone, Copy, Default)]
pub struct Places<'a>(PlaceSource<'a>);

#[derive(Clone, Copy, Default)]
enum PlaceSource<'a> {
    #[default]
    None,
    Slice(&'a [Place]),
    Flat(Vector<'a, fb::Place>),
}

impl<'a> Places<'a> {
    pub(crate) fn flat(places: Option<Vector<'a, fb::Place>>) -> Self {
        Self(places.map_or(PlaceSource::None, PlaceSource::Flat))
    }

    pub fn len(&self) -> usize {
        match self.0 {
            PlaceSource::None => 0,
            PlaceSource::Slice(places) => places.len(),
            PlaceSource::Flat(places) => places.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `None` behind the last.
    pub fn get(&self, at: usize) -> Option<Place> {
        match self.0 {
            PlaceSource::None => None,
            PlaceSource::Slice(places) => places.get(at).copied(),
            PlaceSource::Flat(places) => (at < places.len()).then(|| Place::from(places.get(at))),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Place> + use<'a> {
        let places = *self;
        (0..places.len()).filter_map(move |at| places.get(at))
    }
}

impl From<&fb::Place> for Place {
    fn from(place: &fb::Place) -> Self {
        let conversation = ConversationId((u128::from(place.a()) << 64) | u128::from(place.b()));
        Self { conversation, seq: Seq(place.seq()) }
    }
}

impl<'a> From<&'a [Place]> for Places<'a> {
    fn from(places: &'a [Place]) -> Self {
        Self(PlaceSource::Slice(places))
    }
}

impl PartialEq for Places<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Places<'_> {}

impl fmt::Debug for Places<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
