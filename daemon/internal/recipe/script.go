package recipe

import (
	"bytes"
	"path"
	"regexp"
	"strings"
)

const writeHidden = "Write it under a hidden name, such as .job, and rename it when it is whole."

// checkScript says what would keep a text from running as the Bash script that
// its writer meant.
func checkScript(text []byte) error {
	first, _, _ := bytes.Cut(text, []byte("\n"))
	if err := checkText(text, "Bash", writeHidden); err != nil {
		return err
	}
	if i := bytes.IndexByte(text, 0); i >= 0 {
		return refuse("Drop a Bash script; programs and archives can be downloaded by one.",
			"line %d: it has a NUL byte, so it is no text", lineOf(text, i))
	}
	if n := bytes.Count(text, []byte("\n")); n > 0 && n == bytes.Count(text, []byte("\r\n")) {
		return refuse(`Save it with Unix line ends (LF), or convert it: sed -i 's/\r$//' FILE`, "line 1: its lines end as on Windows (CRLF), and Bash takes the CR for a part of each command")
	}
	interpreter, _, ok := shebang(string(first))
	if !ok {
		return refuse("Name bash alone in line 1 and set its options in line 2: set -eu", "line 1: Bash's option can't be kept: %s", first)
	}
	if interpreter != "" && !isShell(interpreter) {
		return refuse("Drop a Bash script; it can run other languages with a here-document.", "line 1: it asks for %s, and scripts are run by Bash", interpreter)
	}
	return nil
}

// scriptBody returns the script as it stands, but for options in its first
// line: the request has a first line of its own, so they are set instead. The
// numbers of the lines stay.
func scriptBody(text []byte) []byte {
	first, rest, _ := bytes.Cut(text, []byte("\n"))
	_, options, _ := shebang(string(first))
	if len(options) == 0 {
		return text
	}
	var b bytes.Buffer
	b.WriteString("set " + strings.Join(options, " ") + " " + string(first) + "\n")
	b.Write(rest)
	return b.Bytes()
}

// settable are the words that can be handed from a first line to Bash's set.
var settable = regexp.MustCompile(`^([-+][abefhkmnptuvxBCEHPT]*o?|[a-z]+)$`)

// shebang takes a script's first line apart. ok is false where it has options
// for a shell that only a command line can have.
func shebang(line string) (interpreter string, options []string, ok bool) {
	line, found := strings.CutPrefix(line, "#!")
	words := strings.Fields(line)
	if !found || len(words) == 0 {
		return "", nil, true
	}
	interpreter, words = path.Base(words[0]), words[1:]
	if interpreter == "env" {
		for len(words) > 0 && (strings.HasPrefix(words[0], "-") || strings.Contains(words[0], "=")) {
			words = words[1:]
		}
		if len(words) == 0 {
			return "", nil, true
		}
		interpreter, words = path.Base(words[0]), words[1:]
	}
	if !isShell(interpreter) {
		return interpreter, nil, true
	}
	for i, word := range words {
		named := i > 0 && strings.HasSuffix(words[i-1], "o")
		if !settable.MatchString(word) || named != (word[0] != '-' && word[0] != '+') {
			return interpreter, nil, false
		}
	}
	if n := len(words); n > 0 && strings.HasSuffix(words[n-1], "o") {
		return interpreter, nil, false
	}
	return interpreter, words, true
}

func isShell(interpreter string) bool {
	switch interpreter {
	case "bash", "sh", "dash", "ash":
		return true
	}
	return false
}
