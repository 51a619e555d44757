package config

import "testing"

func TestSize(t *testing.T) {
	for text, want := range map[string]Size{
		"0": 0, "500M": 500 << 20, "2G": 2 << 30, "2g": 2 << 30, "2GB": 2 << 30, "2 GiB": 2 << 30, "1.5T": 3 << 39, "64K": 64 << 10, "0.5G": 512 << 20,
	} {
		var got Size
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want {
			t.Errorf("%q is %d, %v, want %d", text, got, err, want)
		}
		var again Size
		if err := again.UnmarshalText([]byte(got.String())); err != nil || again != got {
			t.Errorf("%q is written as %q, which is %d, %v", text, got, again, err)
		}
	}
	for _, text := range []string{"", "2", "G", "-1G", "2X", "2G 3G", "1e3G", "9999999999T"} {
		var got Size
		if err := got.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was taken for %d", text, got)
		}
	}
}
