package product

import (
	"os"
	"path/filepath"
	"testing"
)

// FuzzFind: whatever a build declares as its product, it is files that there
// are, named without a link in the way.
func FuzzFind(f *testing.F) {
	for _, seed := range []string{"file iso image.iso\n", "file iso \"sub/a file\"\n", "doc x y\nfile\n", "file iso ../../../etc/passwd", "file x \"\"", "\x00"} {
		f.Add([]byte(seed), "image.iso")
	}
	f.Add([]byte(""), "../x")
	f.Fuzz(func(t *testing.T, products []byte, path string) {
		dir := t.TempDir()
		for name, data := range map[string][]byte{Products: products, "image.iso": nil, "sub/a file": nil} {
			name = filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		files, err := Find(dir, path)
		if err == nil && len(files) == 0 {
			t.Errorf("%q: nothing, and no error", products)
		}
		for _, name := range files {
			if info, err := os.Lstat(name); err != nil || !info.Mode().IsRegular() || !filepath.IsAbs(name) {
				t.Errorf("%q: %q, %v", products, name, err)
			}
		}
	})
}
