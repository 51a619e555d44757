package config

import (
	"math"
	"regexp"
	"strconv"
	"strings"
)

// A Size is a number of bytes, written as RAM_SIZE and DISK_SIZE are: 500M, 2G.
type Size int64

var sizePattern = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(?:I?B)?$`)

// UnmarshalText reads a size. A bare number is 0 or no size: of what unit it
// was meant to be nobody knows.
func (s *Size) UnmarshalText(text []byte) error {
	m := sizePattern.FindStringSubmatch(strings.ToUpper(strings.TrimSpace(string(text))))
	if m == nil {
		return strconv.ErrSyntax
	}
	n, err := strconv.ParseFloat(m[1], 64)
	if err != nil || m[2] == "" && n != 0 {
		return strconv.ErrSyntax
	}
	if m[2] != "" {
		n *= math.Pow(1024, float64(1+strings.Index("KMGT", m[2])))
	}
	if n > 1<<60 {
		return strconv.ErrRange
	}
	*s = Size(n)
	return nil
}

// String writes it as a setting.
func (s Size) String() string {
	for i, unit := range []string{"T", "G", "M", "K"} {
		if n := Size(1) << (40 - 10*i); s > 0 && s%n == 0 {
			return strconv.FormatInt(int64(s/n), 10) + unit
		}
	}
	return strconv.FormatInt(int64(s), 10)
}
