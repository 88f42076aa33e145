package fleet

import (
	"fmt"

	"github.com/dunlin/dunlin/models"
)

// Skew says which versions of the agent a controller is made for, and whether
// an agent's is none of them: those of its own minor version, and of the one
// before and the one after. A version that is not three numbers is not judged.
func Skew(controller, agent string) (made string, outside bool) {
	c, err := models.ParseRelease(controller)
	if err != nil {
		return "", false
	}
	made = fmt.Sprintf("%d.%d to %d.%d", c[0], max(c[1], 1)-1, c[0], c[1]+1)
	a, err := models.ParseRelease(agent)
	if err != nil {
		return made, false
	}
	return made, a[0] != c[0] || a[1]+1 < c[1] || a[1] > c[1]+1
}
