"""Facts that Python, the C++ kernels and the Triton kernels have to agree on, each in this one place.

It imports nothing, so that setup.py and the Makefile can read it: `python kernels/constants.py` prints the flags that
hand the facts to the C++ compiler.
"""

ABI = 3  # the version of the C++ functions' signatures: raise it with every change of one
EPS = 1e-6  # of LayerNorm, of the mean that GRN divides by, of a target patch's variance (ConvNeXt V2, official code)
SIDES = (8, 4, 2, 1)  # positions along a patch's side in the four stages
WINDOW = 7  # positions along the side of the depthwise convolution's window
HALO = WINDOW // 2  # positions that a window reaches beyond its centre; where a patch is one position, patches
TAPS = WINDOW * WINDOW

CXX_FLAGS = [f"-DSPARSE_FCMAE_ABI={ABI}", f"-DSPARSE_FCMAE_EPS={EPS}f", f"-DSPARSE_FCMAE_WINDOW={WINDOW}"]

if __name__ == "__main__":
    print(*CXX_FLAGS)
