package nixlog

import (
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

// MaxLine bounds a line, in bytes; what is longer is cut and says so.
const MaxLine = 8 << 10

// escape matches what moves a terminal's cursor or changes its colour: CSI,
// OSC (ended by BEL or ST), and the two-character ones.
var escape = regexp.MustCompile(`\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]`)

// Plain is one line without control characters. Of what a carriage return
// overwrites the last is kept, as on a terminal.
func Plain(line string) string {
	line = strings.ToValidUTF8(line, "�")
	line = escape.ReplaceAllString(line, "")
	line = strings.TrimRight(line, "\r\n")
	if i := strings.LastIndexByte(line, '\r'); i >= 0 {
		line = line[i+1:]
	}
	line = strings.ReplaceAll(line, "\t", "    ")
	line = strings.Map(func(r rune) rune {
		// Line and paragraph separators, and what turns the direction of
		// writing, are as good as control characters.
		if unicode.IsControl(r) || unicode.In(r, unicode.Zl, unicode.Zp, unicode.Bidi_Control) {
			return -1
		}
		return r
	}, line)
	line = strings.TrimRight(line, " ")
	if len(line) > MaxLine {
		cut := MaxLine
		for cut > 0 && !utf8.RuneStart(line[cut]) {
			cut--
		}
		line = line[:cut] + " … (cut)"
	}
	return line
}

// PlainLines is text of several lines, each of them plain.
func PlainLines(text string) []string {
	lines := strings.Split(strings.TrimRight(text, "\r\n"), "\n")
	for i, line := range lines {
		lines[i] = Plain(line)
	}
	return lines
}

// plainText is [PlainLines] joined again.
func plainText(text string) string { return strings.Join(PlainLines(text), "\n") }

// DrvName is the name of a derivation or store path: without folder, hash and
// suffix.
func DrvName(path string) string {
	name := path[strings.LastIndexByte(path, '/')+1:]
	if hash, rest, ok := strings.Cut(name, "-"); ok && len(hash) == 32 {
		name = rest
	}
	return strings.TrimSuffix(name, ".drv")
}
