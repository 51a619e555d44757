package logging

import (
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// consoleCore writes one line for people:
//
//	2026-01-02T03:04:05Z INFO  inbox     drop taken               job=hello-iso id=20260102-030405-abcdef
//	hello-iso | a line of the build
//
// zap's own console encoder shows fields as JSON and aligns nothing.
type consoleCore struct {
	zapcore.LevelEnabler
	out    *Output
	color  bool
	names  *atomic.Int32 // width of the column of names before the builds' lines
	fields []zapcore.Field
}

// With implements [zapcore.Core].
func (c *consoleCore) With(fields []zapcore.Field) zapcore.Core {
	clone := *c
	clone.fields = slices.Concat(c.fields, fields)
	return &clone
}

// Check implements [zapcore.Core].
func (c *consoleCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *consoleCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	_, err := c.out.Write(c.format(e, fields))
	return err
}

// Sync implements [zapcore.Core].
func (c *consoleCore) Sync() error { return nil }

const (
	messageWidth = 24 // what most messages fit into
	maxNameWidth = 20 // a longer name moves its own lines alone
)

func (c *consoleCore) format(e zapcore.Entry, fields []zapcore.Field) []byte {
	values := make([]string, 0, len(c.fields)+len(fields))
	var name, line string
	for _, f := range slices.Concat(c.fields, fields) {
		// One encoder for each, since a map would lose the order.
		encoded := zapcore.NewMapObjectEncoder()
		f.AddTo(encoded)
		for _, key := range slices.Sorted(maps.Keys(encoded.Fields)) {
			switch value := encoded.Fields[key]; {
			case e.Message == lineMessage && key == "job":
				name = text(value)
			case e.Message == lineMessage && key == "line":
				line = text(value)
			case strings.HasSuffix(key, "Verbose"): // zap's stack of an error
			default:
				values = append(values, c.field(key, value))
			}
		}
	}
	if e.Message == lineMessage {
		return []byte(strings.TrimRight(c.column(Clean(name))+" | "+Clean(line), " ") + "\n")
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %-9s %s", e.Time.UTC().Format(time.RFC3339), c.level(e.Level), Clean(e.LoggerName), pad(Clean(e.Message), messageWidth))
	if len(values) > 0 {
		b.WriteString("  ")
		b.WriteString(strings.Join(values, " "))
	}
	return []byte(strings.TrimRight(b.String(), " ") + "\n")
}

// field shows one key and value: sizes and durations as people say them.
func (c *consoleCore) field(key string, value any) string {
	shown := quote(text(value))
	switch n, isNumber := value.(int64); {
	case isNumber && key == "bytes":
		key, shown = "size", size(n)
	case isNumber && strings.HasSuffix(key, "_bytes"):
		key, shown = strings.TrimSuffix(key, "_bytes"), size(n)
	case key == "job":
		shown = c.paint(nameColor(text(value)), shown)
	}
	return Clean(key) + "=" + shown
}

// column returns the name that stands before a build's line, as wide as the
// widest one so far: the lines of jobs that run at once stay below one another.
func (c *consoleCore) column(name string) string {
	width := min(int32(utf8.RuneCountInString(name)), maxNameWidth)
	for {
		widest := c.names.Load()
		if width <= widest {
			width = widest
			break
		}
		if c.names.CompareAndSwap(widest, width) {
			break
		}
	}
	return c.paint(nameColor(name), pad(name, int(width)))
}

func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
}

// The colours, as SGR parameters. Red and yellow are kept for levels.
const (
	red    = "31"
	yellow = "33"
)

var nameColors = []string{"36", "32", "35", "34", "96", "92", "95", "94"}

// nameColor gives a name the same colour each time.
func nameColor(name string) string {
	h := fnv.New32a()
	_, _ = io.WriteString(h, name) // a hash takes everything
	return nameColors[h.Sum32()%uint32(len(nameColors))]
}

// paint is where the only escape sequences in the log come from.
func (c *consoleCore) paint(color, s string) string {
	if !c.color || color == "" {
		return s
	}
	return "\x1b[" + color + "m" + s + "\x1b[0m"
}

func (c *consoleCore) level(l zapcore.Level) string {
	color := ""
	switch {
	case l >= zapcore.ErrorLevel:
		color = red
	case l == zapcore.WarnLevel:
		color = yellow
	}
	return c.paint(color, pad(l.CapitalString(), 5))
}

// size is a number of bytes as people say it.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1<<10 {
		return fmt.Sprintf("%dB", n)
	}
	f, unit := float64(n)/(1<<10), 0
	for ; f >= 1023.95 && unit < len(units)-1; unit++ {
		f /= 1 << 10
	}
	return fmt.Sprintf("%.1f%ciB", f, units[unit])
}

func text(value any) string {
	switch v := value.(type) {
	case string:
		return v
	case time.Time:
		return v.UTC().Format(time.RFC3339)
	case time.Duration:
		if v >= time.Minute {
			return v.Round(time.Second).String()
		}
		return v.Round(time.Millisecond).String()
	default:
		return fmt.Sprint(v)
	}
}

// quote sets in quotes what could not be told from what follows.
func quote(value string) string {
	clean := Clean(value)
	if clean == "" || strings.ContainsAny(clean, " \t\"=") {
		return `"` + strings.ReplaceAll(clean, `"`, `\"`) + `"`
	}
	return clean
}

// render returns the line that says how many lines were dropped, in the form
// of core.
func render(core zapcore.Core, dropped int) ([]byte, error) {
	entry := zapcore.Entry{Level: zapcore.WarnLevel, Time: time.Now(), LoggerName: "log", Message: droppedMessage}
	field := zap.Int("dropped", dropped)
	if c, ok := core.(*consoleCore); ok {
		return c.format(entry, []zapcore.Field{field}), nil
	}
	encoded, err := jsonEncoder().EncodeEntry(entry, []zapcore.Field{field})
	if err != nil {
		return nil, err
	}
	defer encoded.Free()
	return slices.Clone(encoded.Bytes()), nil
}
