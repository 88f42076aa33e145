/* As much of an NVML library as an agent needs to find that there is one, and
   no GPU: for the test of the agent that build.sh builds. */
#include <string.h>

int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
	strncpy(version, "580.1.2", length);
	return 0;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
	*count = 0;
	return 0;
}

/* go-nvml calls the newest version of a function; the agent looks for the first,
   which the driver's library has as well. */
int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }
