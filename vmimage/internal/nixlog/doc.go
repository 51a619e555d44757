// Package nixlog reads what Nix says with --log-format internal-json, and
// makes of it plain lines for people, and facts for whoever explains a
// failure.
//
// The format is Nix's own and not promised: so unknown numbers are accepted,
// and what is no such line is taken as text.
package nixlog
