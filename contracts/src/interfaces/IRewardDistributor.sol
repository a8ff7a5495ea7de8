// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IAttributionLog} from "./IAttributionLog.sol";

/// @title Rewards out of logs' deposits, by a Merkle root of cumulative amounts
/// @notice An epoch moves amounts from the deposits of at most 32 logs to the accounts of one Merkle root. A publisher
/// proposes it, attestors who computed the same sign it, a guardian may veto it during the delay, and then anybody may
/// have it accepted. Nothing is ever paid but `claimed ≤ total ≤ deposits`, and a log pays only out of its own deposit.
interface IRewardDistributor {
    /// @notice What one log pays in one epoch.
    /// @param logId the log
    /// @param from its settled size before
    /// @param to its settled size after, at most the anchored size
    /// @param amount sum of the paid prices of the receipts in [from, to), at most the log's deposit
    struct Allocation {
        bytes32 logId;
        uint64 from;
        uint64 to;
        uint256 amount;
    }

    /// @notice Tokens were added to a log's deposit, for good.
    event Deposited(bytes32 indexed logId, address indexed from, uint256 amount);
    /// @notice An epoch was proposed; it is pending until it is accepted or vetoed.
    event Proposed(uint256 indexed epoch, bytes32 root, uint256 total, Allocation[] allocations);
    /// @notice The pending epoch was vetoed; its number is not used again.
    event Vetoed(uint256 indexed epoch);
    /// @notice The pending epoch was accepted: its root is the one to claim from.
    event Accepted(uint256 indexed epoch, bytes32 root, uint256 total);
    /// @notice An accepted epoch took `amount` from a log's deposit for its receipts in [from, to).
    event Settled(bytes32 indexed logId, uint64 from, uint64 to, uint256 amount);
    /// @notice `amount` was paid to `account`, which now has got `cumulative` in all.
    event Claimed(address indexed account, uint256 amount, uint256 cumulative);
    /// @notice Proposals, acceptance and claims stopped.
    event Paused();
    /// @notice They go on.
    event Unpaused();

    /// @notice The delay, the cap and the threshold are at least 1.
    error ZeroParameter();
    /// @notice Nothing is proposed, accepted or claimed while paused.
    error IsPaused();
    /// @notice It is not paused.
    error IsNotPaused();
    /// @notice Deposits are for registered logs: nobody could ever have this one back.
    error UnknownLog(bytes32 logId);
    /// @notice Another amount arrived than was sent: tokens that take a fee or rebase are refused.
    error WrongAmountReceived(uint256 sent, uint256 received);
    /// @notice The pending epoch has to be accepted or vetoed first.
    error EpochPending(uint256 epoch);
    /// @notice No epoch is pending.
    error NoEpochPending();
    /// @notice More allocations than an epoch may have.
    error TooManyAllocations(uint256 length);
    /// @notice Allocations ascend by log id, each log once.
    error AllocationsNotAscending(bytes32 previous, bytes32 logId);
    /// @notice An allocation starts where the log is settled up to.
    error WrongStart(bytes32 logId, uint64 from, uint64 settled);
    /// @notice An allocation covers at least one receipt.
    error EmptyRange(bytes32 logId, uint64 from, uint64 to);
    /// @notice Only anchored receipts are settled.
    error NotAnchored(bytes32 logId, uint64 to, uint64 size);
    /// @notice A log pays only out of its own deposit.
    error InsufficientDeposit(bytes32 logId, uint256 amount, uint256 deposit);
    /// @notice The total is the one before plus the allocations.
    error WrongTotal(uint256 total, uint256 expected);
    /// @notice The total has at most 120 bits.
    error TotalTooLarge(uint256 total, uint256 most);
    /// @notice An epoch adds at most the cap.
    error EpochCapExceeded(uint256 amount, uint256 cap);
    /// @notice This is not the pending proposal.
    error NotProposed(bytes32 hash);
    /// @notice The delay is not over.
    error TooEarly(uint64 validAt);
    /// @notice Fewer signatures than the threshold.
    error TooFewSignatures(uint256 length, uint256 threshold);
    /// @notice A signature is not 65 bytes r ‖ s ‖ v with the lower s and v 27 or 28, or fits no key.
    error InvalidSignature(uint256 index);
    /// @notice Signers ascend by address, each once.
    error SignersNotAscending(address previous, address signer);
    /// @notice The signer is no attestor, or it is a publisher or this epoch's proposer.
    error NotAttestor(address signer);
    /// @notice The proof does not lead to the root.
    error InvalidProof();
    /// @notice The account has got that much already.
    error NothingToClaim(uint256 cumulative, uint256 claimed);
    /// @notice More would be paid than was settled: the root is wrong.
    error TotalExceeded(uint256 claimed, uint256 total);

    /// @notice Adds to a log's deposit, for good, out of the caller's tokens (which it approved before).
    /// @param logId a registered log
    /// @param amount in the token's smallest unit
    function deposit(bytes32 logId, uint256 amount) external;

    /// @notice Proposes the next epoch, if none is pending. Only with PUBLISHER_ROLE.
    /// @param root Merkle root of all accounts' cumulative amounts after this epoch, zero without any
    /// @param total sum of all settled amounts after this epoch
    /// @param allocations what each log pays; at most 32, ascending by log id
    function propose(bytes32 root, uint256 total, Allocation[] calldata allocations) external;

    /// @notice Throws away the pending epoch. Only with GUARDIAN_ROLE; also while paused.
    function veto() external;

    /// @notice Stops proposals, acceptance and claims. Only with GUARDIAN_ROLE.
    function pause() external;

    /// @notice Lets them go on. Only for the admin.
    function unpause() external;

    /// @notice Accepts the pending epoch after the delay; everything that `propose` checked is checked again.
    /// @param epoch number of the pending epoch
    /// @param root as proposed
    /// @param total as proposed
    /// @param allocations as proposed
    /// @param signatures at least `threshold()` attestations, ascending by signer: EIP-712
    /// Attestation(uint256 epoch,bytes32 root,uint256 total,Allocation[] allocations)
    function accept(
        uint256 epoch,
        bytes32 root,
        uint256 total,
        Allocation[] calldata allocations,
        bytes[] calldata signatures
    ) external;

    /// @notice Pays an account what it has not got yet. Anybody may call it; the account is paid.
    /// @param account the account
    /// @param cumulative all that it has earned, as in the root
    /// @param proof hashes from its leaf to the root, as OpenZeppelin's standard Merkle tree gives them
    function claim(address account, uint256 cumulative, bytes32[] calldata proof) external;

    /// @notice What of a log's deposits is not settled yet.
    /// @param logId the log
    /// @return amount in the token's smallest unit
    function depositOf(bytes32 logId) external view returns (uint256 amount);

    /// @notice How many of a log's receipts are settled.
    /// @param logId the log
    /// @return size the `to` of its newest allocation, or 0
    function settledSizeOf(bytes32 logId) external view returns (uint64 size);

    /// @notice What an account has got.
    /// @param account the account
    /// @return amount cumulative, in the token's smallest unit
    function claimedOf(address account) external view returns (uint256 amount);

    /// @notice The sums.
    /// @return total all that was settled
    /// @return claimed all that was paid
    /// @return paused whether proposals, acceptance and claims are stopped
    function totals() external view returns (uint256 total, uint256 claimed, bool paused);

    /// @notice The number of the newest proposal, pending or not; 0 before the first. A vetoed number is not used again.
    /// @return number the epoch
    function epoch() external view returns (uint256 number);

    /// @notice The root to claim from.
    /// @return hash the root of the epoch accepted last, or zero
    function root() external view returns (bytes32 hash);

    /// @notice The pending proposal; both zero if there is none.
    /// @return hash the EIP-712 digest that attestors sign
    /// @return validAt from when it can be accepted, in seconds since 1970
    function pending() external view returns (bytes32 hash, uint64 validAt);

    /// @notice The EIP-712 digest that attestors sign.
    /// @param epoch_ number of the epoch
    /// @param root_ its root
    /// @param total its total
    /// @param allocations its allocations
    /// @return digest 32 bytes
    function attestationDigest(uint256 epoch_, bytes32 root_, uint256 total, Allocation[] calldata allocations)
        external
        view
        returns (bytes32 digest);

    /// @notice What is paid with.
    function token() external view returns (IERC20);

    /// @notice Where receipts are anchored.
    function attributionLog() external view returns (IAttributionLog);

    /// @notice Seconds between a proposal and its acceptance, at least.
    function delay() external view returns (uint64);

    /// @notice What one epoch may add to the total, at most.
    function epochCap() external view returns (uint128);

    /// @notice How many attestations an epoch needs.
    function threshold() external view returns (uint8);
}
