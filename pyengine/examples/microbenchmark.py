"""Time two sizes of layer against torch, in float32 and int8, and print the ratios."""

from pyengine.bench import LinearCase, run


def main() -> None:
    cases = [LinearCase(m=1, k=768, n=768), LinearCase(m=32, k=768, n=768)]
    for record in run(cases, threads=1, seconds=0.1):
        name = f"{record['case']:>10} {record['cache']} {record['contender']:<20}"
        if record["median_s"] is None:
            print(f"{name} {record['check']}")
            continue
        ratio = "" if record["ratio"] is None else f", {record['ratio']:.2f}x the speed of the fastest peer"
        print(f"{name} {record['median_s'] * 1e6:7.1f} us{ratio}, error {record['relative_error']:.1e}")


if __name__ == "__main__":
    main()
