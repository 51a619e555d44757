package nixpkgs

import (
	"os"
	"path/filepath"
	"testing"
)

// FuzzPin: whatever lies in the file of the pin, it is this name's pin, whole,
// or none.
func FuzzPin(f *testing.F) {
	for _, seed := range []string{`{"source":"nixos-26.05","url":"https://x","hash":"sha256:x"}`, `{"source":"nixos-26.05"}`, `null`, `{`, "", "\x00"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		file := filepath.Join(t.TempDir(), "pin")
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		pin, ok, err := readPin(file, "nixos-26.05")
		if ok && (err != nil || pin.Source != "nixos-26.05" || pin.URL == "" || pin.Hash == "") {
			t.Errorf("%q: %+v, %v", text, pin, err)
		}
	})
}
