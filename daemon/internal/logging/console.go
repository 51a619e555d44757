package logging

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap/zapcore"
)

// consoleCore writes one line for people:
//
//	2026-01-02T03:04:05Z INFO  inbox     job taken  job=20260102-030405-abcdef name=hello-iso
//	hello-iso | a line of the build
//
// zap's own console encoder shows fields as JSON and aligns nothing.
type consoleCore struct {
	zapcore.LevelEnabler
	out    *Output
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

func (c *consoleCore) format(e zapcore.Entry, fields []zapcore.Field) []byte {
	values := make([]string, 0, len(c.fields)+len(fields))
	var name, line string
	for _, f := range slices.Concat(c.fields, fields) {
		// One encoder for each, since a map would lose the order.
		encoded := zapcore.NewMapObjectEncoder()
		f.AddTo(encoded)
		for _, key := range slices.Sorted(maps.Keys(encoded.Fields)) {
			value := text(encoded.Fields[key])
			switch {
			case e.Message == lineMessage && key == "job":
				name = value
			case e.Message == lineMessage && key == "line":
				line = value
			case strings.HasSuffix(key, "Verbose"): // zap's stack of an error
			default:
				values = append(values, Clean(key)+"="+quote(value))
			}
		}
	}
	if e.Message == lineMessage {
		return []byte(strings.TrimRight(Clean(name)+" | "+Clean(line), " ") + "\n")
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %-5s %-9s %s", e.Time.UTC().Format(time.RFC3339), e.Level.CapitalString(), Clean(e.LoggerName), Clean(e.Message))
	if len(values) > 0 {
		b.WriteString("  ")
		b.WriteString(strings.Join(values, " "))
	}
	b.WriteByte('\n')
	return []byte(b.String())
}

func text(value any) string {
	switch v := value.(type) {
	case string:
		return v
	case time.Time:
		return v.UTC().Format(time.RFC3339)
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
	field := zapcore.Field{Key: "dropped", Type: zapcore.Int64Type, Integer: int64(dropped)}
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
