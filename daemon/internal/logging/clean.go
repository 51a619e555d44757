package logging

import (
	"bytes"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxLine bounds a build's line on standard output, in bytes. Docker's log
// drivers cut lines at 16 KiB.
const maxLine = 8 << 10

// escapes are the sequences by which programs colour their output and set a
// terminal's title.
var escapes = regexp.MustCompile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)?|[@-Z\\\\^_])")

// Clean makes text safe to be shown: colours go, and what else could move the
// cursor, hide or reorder text on a terminal is shown as an escape like \x1b.
// The result has no line break.
func Clean(s string) string {
	if plain(s) {
		return s
	}
	s = escapes.ReplaceAllString(s, "")
	s = strings.TrimRight(s, "\r\n")
	var b strings.Builder
	for i, r := range s {
		if r == utf8.RuneError && !strings.HasPrefix(s[i:], "\uFFFD") {
			fmt.Fprintf(&b, `\x%02x`, s[i])
			continue
		}
		if shown(r) {
			b.WriteRune(r)
			continue
		}
		escaped := strconv.QuoteRune(r)
		b.WriteString(escaped[1 : len(escaped)-1])
	}
	return b.String()
}

func plain(s string) bool {
	for i := range len(s) {
		if (s[i] < ' ' && s[i] != '\t') || s[i] >= 0x7f {
			return false
		}
	}
	return true
}

// shown reports that a terminal shows r in its place. The joiners of scripts
// and emoji are no more than that; other format characters can reverse text.
func shown(r rune) bool {
	return r == '\t' || r == '\u200c' || r == '\u200d' || (unicode.IsGraphic(r) && r != '\u2028' && r != '\u2029')
}

func shorten(s string) string {
	if len(s) <= maxLine {
		return s
	}
	cut := maxLine
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return fmt.Sprintf("%s… (%d bytes more in build.log)", s[:cut], len(s)-cut)
}

// jsonOutput escapes what zap's JSON leaves as it is: DEL and the controls
// from U+0080 on. They can stand in strings only.
type jsonOutput struct{ *Output }

func (o jsonOutput) Write(line []byte) (int, error) {
	clean := line
	if bytes.ContainsFunc(line, unshownControl) {
		clean = nil
		for _, r := range string(line) {
			if unshownControl(r) {
				clean = fmt.Appendf(clean, `\u%04x`, r)
			} else {
				clean = utf8.AppendRune(clean, r)
			}
		}
	}
	if _, err := o.Output.Write(clean); err != nil {
		return 0, err
	}
	return len(line), nil
}

func unshownControl(r rune) bool {
	return r < 0x10000 && r != '\n' && !shown(r)
}
