//! Code that `schema/flatgen` writes from `fbs/wire.fbs`. Not edited by hand; CI regenerates and compares it.

#[rustfmt::skip]
#[allow(clippy::all, unused_imports, dead_code, unsafe_op_in_unsafe_fn, mismatched_lifetime_syntaxes)]
#[path = "wire_generated.rs"]
pub mod wire;
