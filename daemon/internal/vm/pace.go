package vm

import (
	"errors"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// A pacer says how long to wait before the next attempt to connect, so that a
// VM that can't be reached, or one whose links break as soon as they are up,
// is not overrun.
type pacer struct {
	held  time.Duration
	retry *backoff.ExponentialBackOff
	slow  *backoff.ExponentialBackOff // while the host key is wrong
}

// jitter spreads a wait by so much of it to both sides.
const jitter = 0.5

func newPacer(t Timings) *pacer {
	p := &pacer{
		held: t.Held,
		retry: &backoff.ExponentialBackOff{
			InitialInterval: t.RetryMin, RandomizationFactor: jitter, Multiplier: 1.5,
			// The longest wait is meant, jitter included.
			MaxInterval: time.Duration(float64(t.RetryMax) / (1 + jitter)),
		},
		slow: &backoff.ExponentialBackOff{
			InitialInterval: t.RetryHostKey, RandomizationFactor: jitter,
			Multiplier: 1, MaxInterval: t.RetryHostKey,
		},
	}
	p.retry.Reset()
	p.slow.Reset()
	return p
}

// after returns the wait after a session that was up for held, 0 if it never
// was, and ended with err. Only a link that held for a while starts over: one
// that comes up and breaks at once would else be made anew twice a second.
func (p *pacer) after(held time.Duration, err error) time.Duration {
	if held >= p.held {
		p.retry.Reset()
	}
	wait := p.retry.NextBackOff()
	var broken *RungError
	if errors.As(err, &broken) && broken.Rung == RungHostKey {
		wait = p.slow.NextBackOff()
	}
	return wait
}
